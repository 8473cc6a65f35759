// onnxruntime-web (WebAssembly) in node. Request: {folder, prompt_ids, new_tokens, session_options}. Answer: {version, ids: [new tokens]}.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import * as ort from "onnxruntime-web";
import {greedy} from "./greedy.mjs";
import {answer, request} from "./stdio.mjs";

const bytes = (name) => new Uint8Array(readFileSync(join(request.folder, "onnx", name)));
const ids = await greedy(ort, {model: bytes("model.onnx"), data: bytes("model.onnx_data"), ...request});
await answer({version: ort.env.versions.web, ids});

// onnxruntime-web (WebAssembly) in node. Request: {folder, prompt_ids, new_tokens, session_options}. Answer: {version, ids: [new tokens], logits: [of
// the first of them], and what it took, see clock.mjs}.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import * as ort from "onnxruntime-web";
import {Clock} from "./clock.mjs";
import {greedy} from "./greedy.mjs";
import {answer, request, residentBytes} from "./stdio.mjs";

const bytes = (name) => new Uint8Array(readFileSync(join(request.folder, "onnx", name)));
const clock = new Clock(residentBytes);
const found = await greedy(ort, {model: bytes("model.onnx"), data: bytes("model.onnx_data"), ...request}, clock);
await answer({version: ort.env.versions.web, ...found, ...clock.report()});

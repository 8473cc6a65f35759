// onnxruntime-web (WebAssembly) in node. Request: {folder, prompt_ids, new_tokens, session_options}. Answer: {version, ids: [new tokens]}.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import * as ort from "onnxruntime-web";
import {greedy} from "./greedy.mjs";

const {folder, ...request} = JSON.parse(readFileSync(0, "utf8"));
const bytes = (name) => new Uint8Array(readFileSync(join(folder, "onnx", name)));
const ids = await greedy(ort, {model: bytes("model.onnx"), data: bytes("model.onnx_data"), ...request});
console.log(JSON.stringify({version: ort.env.versions.web, ids}));
process.exit(0);

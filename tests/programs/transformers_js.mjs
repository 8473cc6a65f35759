// A text-generation pipeline of transformers.js (onnxruntime-node) from a local folder.
// Request: {folder, prompt, new_tokens, session_options}, the prompt a text or a list of chat messages. Answer: {version, text}.
import {basename, dirname} from "node:path";
import {env, pipeline} from "@huggingface/transformers";
import {answer, request} from "./stdio.mjs";

const {folder, prompt, new_tokens, session_options} = request;
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const generate = await pipeline("text-generation", basename(folder), {session_options});
// Without add_special_tokens there is a begin token only where tokenizer_config.json asks for one.
const options = {max_new_tokens: new_tokens, do_sample: false, add_special_tokens: true, return_full_text: false};
const [{generated_text}] = await generate(prompt, options);
await answer({version: env.version, text: generated_text});

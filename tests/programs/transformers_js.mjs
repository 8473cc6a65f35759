// A text-generation pipeline of transformers.js (onnxruntime-node) from a local folder.
// Request: {folder, prompt, new_tokens, session_options}, the prompt a text or a list of chat messages. Answer: {version, text, and
// what it took, see clock.mjs}.
import {basename, dirname} from "node:path";
import {env, pipeline} from "@huggingface/transformers";
import {Clock} from "./clock.mjs";
import {answer, request, residentBytes} from "./stdio.mjs";

const {folder, prompt, new_tokens, session_options} = request;
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const clock = new Clock(residentBytes);
const generate = await pipeline("text-generation", basename(folder), {session_options});
clock.loaded();
// Without add_special_tokens there is a begin token only where tokenizer_config.json asks for one.
const options = {max_new_tokens: new_tokens, do_sample: false, add_special_tokens: true, return_full_text: false};
// A streamer is first given the prompt.
let prompted = false;
const streamer = {put: () => prompted ? clock.token() : prompted = true, end: () => {}};
const [{generated_text}] = await generate(prompt, {...options, streamer});
await answer({version: env.version, text: generated_text, ...clock.report()});

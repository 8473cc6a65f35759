// Score token windows with stock llama.cpp, as node-llama-cpp ships it prebuilt. Called by llama_cpp_parity.py:
//   node llama_cpp_scores.mjs <folder with node_modules> <request.json>
// The request: {model, refused, text, prompt_ids, new_tokens, windows: [[id]]}. Prints one JSON object: {release, refusal,
// text_ids, greedy_ids, windows: [[natural logarithm of the probability of each token of the second half]]}.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, requestFile] = process.argv.slice(2);
const entry = join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const request = JSON.parse(readFileSync(requestFile, "utf8"));

const messages = [];
const llama = await getLlama({
    gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error, logger: (_, message) => messages.push(message)
});
let refusal = null;
if (request.refused) {
    try {
        await llama.loadModel({modelPath: request.refused});
    } catch (error) {
        refusal = messages.find((message) => message.includes("error loading model")) ?? String(error);
    }
}

const model = await llama.loadModel({modelPath: request.model});
const length = Math.max(...request.windows.map((window) => window.length), request.prompt_ids.length + request.new_tokens);
const context = await model.createContext({contextSize: length, batchSize: length, threads: 2});
const sequence = context.getSequence();

const greedy = [];
for await (const token of sequence.evaluate(request.prompt_ids, {temperature: 0, yieldEogToken: true})) {
    greedy.push(token);
    if (greedy.length >= request.new_tokens)
        break;
}

const windows = [];
for (const window of request.windows) {
    await sequence.clearHistory();
    const first = Math.floor(window.length / 2);
    const results = await sequence.controlledEvaluate(window.map((token, at) => (
        at >= first && at < window.length - 1 ? [token, {generateNext: {probabilities: true}}] : token
    )));
    const scores = [];
    for (let at = first; at < window.length - 1; at++)
        scores.push(Math.log(results[at].next.probabilities.get(window[at + 1])));
    windows.push(scores);
}

console.log(JSON.stringify({
    release: llama.llamaCppRelease.release, refusal, text_ids: model.tokenize(request.text), greedy_ids: greedy, windows
}));
process.exit(0);

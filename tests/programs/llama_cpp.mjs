// Run stock llama.cpp, as node-llama-cpp ships it prebuilt, on a GGUF file.
// Request: {path, text, prompt_ids, new_tokens, windows: [[id]], threads}. Answer: {release, refusal} if it does not load the file, else {release,
// text_ids, greedy_ids, windows: [[natural logarithm of the probability of each token of the second half]],
// and what it took, see clock.mjs}.
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
import {Clock} from "./clock.mjs";
import {answer, request, residentBytes} from "./stdio.mjs";

const clock = new Clock(residentBytes);
const messages = [];
const llama = await getLlama({
    gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error, logger: (_, message) => messages.push(message)
});
const {release} = llama.llamaCppRelease;

const model = await llama.loadModel({modelPath: request.path}).catch((error) => (
    answer({release, refusal: messages.find((message) => message.includes("error loading model")) ?? String(error)})
));

const length = Math.max(...request.windows.map((window) => window.length), request.prompt_ids.length + request.new_tokens);
const context = await model.createContext({contextSize: length, batchSize: length, threads: request.threads ?? 1});
clock.loaded();
const sequence = context.getSequence();

const greedy = [];
for await (const token of sequence.evaluate(request.prompt_ids, {temperature: 0, yieldEogToken: true})) {
    greedy.push(token);
    clock.token();
    if (greedy.length >= request.new_tokens)
        break;
}

const took = clock.report();
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

await answer({release, text_ids: model.tokenize(request.text), greedy_ids: greedy, windows, ...took});

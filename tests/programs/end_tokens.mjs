// What stock llama.cpp makes of the tokenizer of a GGUF file. Request: {path, texts: [text]}. Answer: {release, end_ids, add_bos, add_eos,
// ids: [[id]]}: the tokens that end a generation, what goes around a text, and the texts as ids, special tokens found in them.
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
import {answer, request} from "./stdio.mjs";

const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error, logger: () => {}});
const model = await llama.loadModel({modelPath: request.path});
const count = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
const all = Array.from({length: count}, (_, id) => id);
await answer({
    release: llama.llamaCppRelease.release,
    // llama.cpp's own answer: the method of that name on `model` adds tokens that llama.cpp has struck off.
    end_ids: all.filter((id) => model._model.isEogToken(id)),
    add_bos: model.tokens.shouldPrependBosToken,
    add_eos: model.tokens.shouldAppendEosToken,
    ids: request.texts.map((text) => model.tokenize(text, true))
});

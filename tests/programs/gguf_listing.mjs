// What Hugging Face's parser of GGUF files, which lists them on the Hub, finds in one. Request: {path}. Answer: {metadata, tensors}.
import {gguf} from "@huggingface/gguf";
import {answer, request} from "./stdio.mjs";

BigInt.prototype.toJSON = function () { return Number(this); };
const {metadata, tensorInfos} = await gguf(request.path, {allowLocalFile: true});
await answer({metadata, tensors: tensorInfos});

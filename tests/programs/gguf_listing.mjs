// What Hugging Face's parser of GGUF files, which lists them on the Hub, finds in one. Request: {path}. Answer: {metadata, tensors}.
import {readFileSync} from "node:fs";
import {gguf} from "@huggingface/gguf";

const {path} = JSON.parse(readFileSync(0, "utf8"));
const {metadata, tensorInfos} = await gguf(path, {allowLocalFile: true});
const plain = (key, value) => typeof value === "bigint" ? Number(value) : value;
console.log(JSON.stringify({metadata, tensors: tensorInfos}, plain));

// Greedy decoding with a key-value cache: the `ids` of `new_tokens` tokens after `prompt_ids`, and the `logits` of the first of them. `ort` is an
// onnxruntime module; `model` and `data` are the bytes of model.onnx and model.onnx_data. A `clock` is told when what has happened.
export async function greedy(ort, {model, data, prompt_ids, new_tokens, session_options}, clock) {
    const session = await ort.InferenceSession.create(model, {
        ...session_options,
        executionProviders: ["wasm"],
        externalData: [{path: "model.onnx_data", data}],
    });
    clock.loaded();
    const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    let cache = {};
    for (const {name, shape} of session.inputMetadata)
        if (name.startsWith("past_key_values."))
            cache[name] = new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]]);

    const ids = [];
    let first;
    let past = 0;
    let next = prompt_ids;
    while (ids.length < new_tokens) {
        const total = past + next.length;
        const outputs = await session.run({
            input_ids: integers(next),
            attention_mask: integers(Array(total).fill(1)),
            position_ids: integers(next.map((_, at) => past + at)),
            ...cache,
        });
        const vocabulary = outputs.logits.dims[2];
        const logits = outputs.logits.data.subarray((next.length - 1) * vocabulary);
        first ??= Array.from(logits);
        cache = {};
        for (const [name, tensor] of Object.entries(outputs))
            if (name.startsWith("present."))
                cache[name.replace("present.", "past_key_values.")] = tensor;
        past = total;
        next = [logits.reduce((best, logit, at) => logit > logits[best] ? at : best, 0)];
        ids.push(...next);
        clock.token();
    }
    return {ids, logits: first};
}

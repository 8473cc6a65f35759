// What a page here does: gets its request from the server, answers it with `work(request)` and posts the answer, or {error}.
export async function answer(work) {
    const post = (content) => fetch("/answer", {method: "POST", body: JSON.stringify(content)});
    const fail = (error) => post({error: String(error?.stack ?? error)});
    addEventListener("unhandledrejection", (event) => fail(event.reason));
    try {
        await post(await work(await (await fetch("/request.json")).json()));
    } catch (error) {
        await fail(error);
    }
}

// What a program took: seconds to load, tokens per second after the first and, where `residentBytes` tells it, peak resident memory and what of it
// was there before loading.
export class Clock {
    #residentBytes;
    #base;
    #begin = performance.now();
    #load;
    #tokens = [];

    constructor(residentBytes = () => null) {
        this.#residentBytes = residentBytes;
        this.#base = residentBytes();
    }

    loaded() {
        this.#load = performance.now() - this.#begin;
    }

    token() {
        this.#tokens.push(performance.now());
    }

    report() {
        const seconds = (this.#tokens.at(-1) - this.#tokens[0]) / 1000;
        return {
            load_seconds: this.#load / 1000,
            tokens_per_second: (this.#tokens.length - 1) / seconds,
            peak_bytes: this.#residentBytes(),
            base_bytes: this.#base,
        };
    }
}

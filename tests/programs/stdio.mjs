// How node_programs.py talks to the scripts here: one JSON request on standard input, one line of JSON as the answer. And what it cannot see from there.
import {readFileSync} from "node:fs";

export const request = JSON.parse(readFileSync(0, "utf8"));

// Ends the process, whose runtime may still have threads: not before the whole line has left, for a pipe takes only a part at once.
export async function answer(content) {
    await new Promise((done) => process.stdout.write(JSON.stringify(content) + "\n", done));
    process.exit(0);
}

// The most memory this process has had resident. Not process.resourceUsage(): its maximum starts at what the parent had. Linux only.
export const residentBytes = () => Number(/VmHWM:\s*(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) * 1024;

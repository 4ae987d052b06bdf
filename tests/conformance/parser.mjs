// Parses standard input as server-sent events, in pieces of 7 bytes, and prints each event's data as JSON.
import { createParser } from "eventsource-parser";

const parser = createParser({
  onEvent: (event) => console.log(JSON.stringify({ event: event.event ?? null, data: event.data })),
  onError: (error) => {
    throw error;
  },
});
const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const bytes = Buffer.concat(chunks);
const decoder = new TextDecoder();
for (let at = 0; at < bytes.length; at += 7) parser.feed(decoder.decode(bytes.subarray(at, at + 7), { stream: true }));

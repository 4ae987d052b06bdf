// The official JavaScript SDK, as it is, against Rift. Each check prints one line; the first that fails ends it.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, key, model] = process.argv.slice(2);
const client = new OpenAI({ apiKey: key, baseURL: `${url}/v1`, maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const weather = {
  type: "function",
  function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};

const checks = {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages, n: 2 });
    assert.deepEqual(answer.choices.map((c) => c.message.content), ["Hello, world 🌊! 0", "Hello, world 🌊! 1"]);
    assert.equal(answer.usage.total_tokens, 17);
    assert.equal(answer._request_id, answer.id);
  },
  async "chat streamed"() {
    const options = { include_usage: true };
    const stream = await client.chat.completions.create({ model, messages, stream: true, stream_options: options });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, "Hello, world 🌊!");
    assert.equal(usage.completion_tokens, 5);
  },
  async "the SDK's own accumulation"() {
    const runner = client.chat.completions.stream({ model, messages, tools: [weather], tool_choice: "required" });
    const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.equal(call.function.arguments, '{"city": "Paris"}');
  },
  async "a schema"() {
    const schema = { type: "object", properties: { city: { type: "string" } } };
    const answer = await client.chat.completions.create({
      model,
      messages,
      response_format: { type: "json_schema", json_schema: { name: "city", schema, strict: true } },
    });
    assert.equal(JSON.parse(answer.choices[0].message.content).city, "Paris");
  },
  async completions() {
    const answer = await client.completions.create({ model, prompt: "hi", max_tokens: 2 });
    assert.equal(answer.choices[0].text, "Hello,");
  },
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    assert.deepEqual(found, [model]);
  },
  async errors() {
    await assert.rejects(
      client.chat.completions.create({ model, messages, temperature: 9 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
    );
    await assert.rejects(client.models.retrieve("gpt-9"), OpenAI.NotFoundError);
    const late = [{ role: "user", content: "fail late" }];
    const stream = await client.chat.completions.create({ model, messages: late, stream: true });
    await assert.rejects(async () => {
      for await (const chunk of stream) void chunk;
    }, /the engine failed/);
  },
  async "a timeout and an abort"() {
    const slow = [{ role: "user", content: "slowly" }];
    await assert.rejects(
      client.chat.completions.create({ model, messages: slow }, { timeout: 300 }),
      OpenAI.APIConnectionTimeoutError,
    );
    const stream = await client.chat.completions.create({ model, messages: slow, stream: true });
    for await (const chunk of stream) {
      void chunk;
      break;
    }
  },
  async responses() {
    const answer = await client.responses.create({ model, input: "hi", reasoning: { effort: "low" } });
    assert.equal(answer.output_text, "Hello, world 🌊!");
    assert.equal((await client.responses.retrieve(answer.id)).output_text, answer.output_text);
  },
  async "responses streamed"() {
    const runner = client.responses.stream({ model, input: "hi" });
    const kinds = [];
    for await (const event of runner) kinds.push(event.type);
    assert.equal(kinds.at(-1), "response.completed");
    assert.equal((await runner.finalResponse()).output_text, "Hello, world 🌊!");
  },
  async "a response in the background"() {
    const begun = await client.responses.create({ model, input: "slowly", background: true, max_output_tokens: 5 });
    const all = [];
    for await (const event of await client.responses.retrieve(begun.id, { stream: true })) all.push(event);
    const rest = [];
    const again = await client.responses.retrieve(begun.id, { stream: true, starting_after: 3 });
    for await (const event of again) rest.push(event);
    assert.deepEqual(rest, all.slice(4));
    assert.equal((await client.responses.cancel(begun.id)).status, "incomplete");
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}

// OpenAI's JavaScript library, in node. Prints what checking.py prints.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.CROSSDOCK_MODEL;
const client = new OpenAI({ maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model, messages, temperature: 0, max_tokens: 16 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];

const checks = {
  async models() {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    assert(ids.includes(model));
  },

  async chat() {
    const answer = await client.chat.completions.create(asked);
    assert.match(answer.choices[0].message.content, /Paris/);
  },

  async stream() {
    const whole = await client.chat.completions.create(asked);
    const stream = await client.chat.completions.create({ ...asked, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
  },

  async completions() {
    const answer = await client.completions.create({ model, prompt: "One, two,", logprobs: 2, max_tokens: 4 });
    assert.equal(answer.choices[0].logprobs.tokens.length, 4);
  },

  async "tools in two turns"() {
    const question = [{ role: "user", content: "What is the weather in Paris?" }];
    const common = { model, tools, parallel_tool_calls: false, temperature: 0, max_tokens: 60 };
    const first = await client.chat.completions.create({ ...common, messages: question, tool_choice: "required" });
    const message = first.choices[0].message;
    const call = message.tool_calls[0];
    assert.equal(call.function.name, "get_weather");
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
    const result = { role: "tool", tool_call_id: call.id, content: "18 degrees, sunny" };
    const second = await client.chat.completions.create({
      ...common, messages: [...question, message, result], tool_choice: "none",
    });
    assert(second.choices[0].message.content);
  },

  async "streamed tools"() {
    const stream = client.chat.completions.stream({
      model, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 60, temperature: 0,
      messages: [{ role: "user", content: "What is the weather in Paris?" }],
    });
    const message = await stream.finalMessage();
    assert.deepEqual(Object.keys(JSON.parse(message.tool_calls[0].function.arguments)), ["city"]);
  },

  async "chat.completions.parse with a zod schema"() {
    const City = z.object({ name: z.string().max(20), people: z.number().int() });
    const answer = await client.chat.completions.parse({
      model, messages, max_tokens: 80, temperature: 0, response_format: zodResponseFormat(City, "city"),
    });
    assert.equal(typeof answer.choices[0].message.parsed.name, "string");
  },

  async "errors by class"() {
    await assert.rejects(client.chat.completions.create({ ...asked, model: "no" }), OpenAI.NotFoundError);
    await assert.rejects(
      client.completions.create({ model, prompt: Array(8193).fill(504) }),
      (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
    );
    const stranger = client.withOptions({ apiKey: "xd-nobody" });
    await assert.rejects(stranger.chat.completions.create(asked), OpenAI.AuthenticationError);
    await assert.rejects(client.embeddings.create({ model, input: "Hello" }), OpenAI.NotFoundError);
  },

  async "429 retried"() {
    const patient = client.withOptions({ apiKey: process.env.CROSSDOCK_KEY_ONE, maxRetries: 20 });
    const answers = await Promise.all([1, 2, 3].map(() => patient.chat.completions.create(asked)));
    assert(answers.every((each) => each.choices.length === 1));
  },

  async "a stream left early"() {
    const stream = await client.chat.completions.create({ ...asked, max_tokens: 500, stream: true });
    for await (const _ of stream) break;
    assert.equal((await client.completions.create({ model, prompt: "Hello", max_tokens: 2 })).usage.completion_tokens, 2);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  const started = performance.now();
  try {
    await check();
    console.log(`ok     ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}`);
    console.error(error);
  }
}
process.exit(failed ? 1 : 0);

// gRPC's own JavaScript client, in node. Prints what checking.py prints.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const { CROSSDOCK_GRPC, CROSSDOCK_MODEL, CROSSDOCK_PROTO, OPENAI_API_KEY, SSL_CERT_FILE } = process.env;
const trusted = SSL_CERT_FILE
  ? grpc.credentials.createSsl(readFileSync(SSL_CERT_FILE))
  : grpc.credentials.createInsecure();

function service(file, name, served) {
  const found = loader.loadSync(join(CROSSDOCK_PROTO, file), { keepCase: true, longs: Number, enums: String })[name];
  for (const [method, each] of Object.entries(found)) each.path = `/${served}/${method}`;
  return grpc.makeGenericClientConstructor(found, served);
}

const Inference = service("inference.proto", "crossdock.v1.Inference", "crossdock.v1.Inference");
const KServe = service("kserve.proto", "crossdock.v1.kserve.GRPCInferenceService", "inference.GRPCInferenceService");
const client = new Inference(CROSSDOCK_GRPC, trusted);

function withKey() {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${OPENAI_API_KEY}`);
  return metadata;
}

const asked = (max_tokens, more = {}) => ({
  text: "The capital of France is",
  sampling: { max_tokens, temperature: 0, ...more },
});

const unary = (to, method, message, options = {}) =>
  new Promise((resolve, reject) =>
    to[method](message, withKey(), options, (error, answer) => (error ? reject(error) : resolve(answer))));

async function textOf(call) {
  let text = "";
  for await (const each of call) text += each.text ?? "";
  return text;
}

const checks = {
  async "unary"() {
    const answer = await unary(client, "GenerateUnary", asked(8));
    assert.match(answer.completions[0].text, /Paris/);
    assert.equal((await unary(client, "ListModels", {})).models[0].id, CROSSDOCK_MODEL);
  },

  async "a stream"() {
    const whole = await unary(client, "GenerateUnary", asked(16));
    assert.equal(await textOf(client.Generate(asked(16), withKey())), whole.completions[0].text);
  },

  async "a stream that is not read, and others beside it in its connection"() {
    const slow = client.Generate(asked(200, { ignore_eos: true }), withKey());
    await new Promise((resolve) => slow.once("data", resolve));
    slow.pause();
    for (let i = 0; i < 3; i++) await unary(client, "GenerateUnary", asked(2));
    let last;
    for await (const each of slow) last = each;
    assert.equal(last.usage.completion_tokens, 200);
  },

  async "cancelled"() {
    const call = client.Generate(asked(2000, { ignore_eos: true }), withKey());
    call.once("data", () => call.cancel());
    await assert.rejects(textOf(call), { code: grpc.status.CANCELLED });
  },

  async "a deadline"() {
    const options = { deadline: Date.now() + 300 };
    const call = client.Generate(asked(2000, { ignore_eos: true }), withKey(), options);
    await assert.rejects(textOf(call), { code: grpc.status.DEADLINE_EXCEEDED });
  },

  async "gzip"() {
    const options = { "grpc.default_compression_algorithm": 2 };
    const packing = new Inference(CROSSDOCK_GRPC, trusted, options);
    const question = { ...asked(8), text: "One, two, three. ".repeat(50) };
    assert((await unary(packing, "GenerateUnary", question)).usage.completion_tokens > 0);
    packing.close();
  },

  async "errors by code, with details"() {
    const wrong = unary(client, "GenerateUnary", asked(8, { top_p: 2 }));
    await assert.rejects(wrong, (error) => {
      assert.equal(error.code, grpc.status.INVALID_ARGUMENT);
      assert.equal(error.metadata.get("grpc-status-details-bin").length, 1);
      return true;
    });
  },

  async "KServe's ModelStreamInfer, two requests in a stream"() {
    const stream = new KServe(CROSSDOCK_GRPC, trusted).ModelStreamInfer(withKey());
    const text = { bytes_contents: [Buffer.from("The capital of France is")] };
    for (const id of ["one", "two"]) {
      stream.write({
        id,
        model_name: CROSSDOCK_MODEL,
        parameters: { max_tokens: { int64_param: 8 }, temperature: { double_param: 0 } },
        inputs: [{ name: "text_input", datatype: "BYTES", shape: [1], contents: text }],
      });
    }
    stream.end();
    const seen = new Set();
    for await (const each of stream) {
      assert(!each.error_message, each.error_message);
      seen.add(each.infer_response.id);
    }
    assert.deepEqual([...seen].sort(), ["one", "two"]);
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
client.close();
process.exit(failed ? 1 : 0);

// Flows of the official openai client for Node: `node openai_node.mjs PACKAGES URL MODEL FLOW` prints what came as JSON.

import { createRequire } from "node:module";

const [packages, url, model, flow] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${packages}/`)("openai");
const messages = [{ role: "user", content: "hello" }];
const clientWith = (options) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, ...options });
const client = clientWith({});

async function errorOf(asking) {
  try {
    await asking;
  } catch (error) {
    const { status, type, param, code } = error;
    return { name: error.constructor.name, status, type, param, code, retryAfter: error.headers?.get?.("retry-after") };
  }
  return null;
}

const flows = {
  async completion() {
    const whole = await client.completions.create({ model, prompt: "Once", max_tokens: 200 });
    const several = await client.completions.create({ model, prompt: ["Once", "Twice"], max_tokens: 200 });
    const stream = await client.completions.create({
      model, prompt: "Once", max_tokens: 200, stream: true, stream_options: { include_usage: true },
    });
    let text = "", usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.text ?? "";
      usage = chunk.usage ?? usage;
    }
    return { whole, several: several.choices.map((each) => each.text), text, usage };
  },

  async chat() {
    const whole = await client.chat.completions.create({ model, messages });
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    const deltas = [];
    for await (const chunk of stream) deltas.push(chunk.choices[0].delta);
    const final = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
    const listed = [];
    for await (const each of client.models.list()) listed.push(each.id);
    return { whole, deltas, final, listed, one: (await client.models.retrieve(model)).id };
  },

  async tools() {
    const painted = [];
    const paint = {
      name: "paint", parse: JSON.parse, function: (given) => { painted.push(given); return "painted"; },
      parameters: { type: "object", properties: { colour: { type: "string" } }, required: ["colour"] },
    };
    const contents = [];
    for (const stream of [false, true]) {
      const asked = { model, messages, stream, max_tokens: 150, tools: [{ type: "function", function: paint }] };
      contents.push(await client.chat.completions.runTools(asked).finalContent());
    }
    return { painted, contents };
  },

  async errors() {
    return {
      unknown: await errorOf(client.completions.create({ model, prompt: "x", suffix: "y" })),
      model: await errorOf(client.completions.create({ model: "other", prompt: "x" })),
      long: await errorOf(client.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(300) }] })),
      route: await errorOf(client.embeddings.create({ model, input: "x" })),
    };
  },

  async error() {
    return await errorOf(client.completions.create({ model, prompt: "x" }));
  },

  async retry() {
    const answer = await clientWith({ maxRetries: 3 }).completions.create({ model, prompt: "x" });
    return answer.choices[0].text;
  },

  async abort() {
    const controller = new AbortController();
    const stream = await client.completions.create({ model, prompt: "x", max_tokens: 200, stream: true }, { signal: controller.signal });
    let chunks = 0;
    for await (const _chunk of stream) if (++chunks === 2) controller.abort();
    const timedOut = await errorOf(clientWith({ timeout: 200 }).completions.create({ model, prompt: "x", max_tokens: 200 }));
    return { chunks, timedOut: timedOut.name };
  },
};

console.log(JSON.stringify(await flows[flow]()));

// Server-sent events from text as it arrives, cut anywhere. Pure: a reader keeps what is not whole yet.
// The browser's EventSource cannot send a key, so the stream is fetched and read here.

export class EventReader {
  #rest = "";

  /** Take more text; return the events that are whole now, each `{topic, data}`. */
  take(text) {
    const parts = (this.#rest + text).split("\n\n");
    this.#rest = parts.pop();
    return parts.map(read).filter((event) => event !== null);
  }
}

function read(block) {
  let topic = "message";
  const lines = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) topic = line.slice(7);
    else if (line.startsWith("data: ")) lines.push(line.slice(6));
  }
  return lines.length === 0 ? null : { topic, data: JSON.parse(lines.join("\n")) };
}

// How values are written: as flexctl writes them, with a unit always. Pure.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** `4.3 MiB`, `812 KiB`, `0 B`. */
export function bytes(count) {
  let exponent = 0;
  while (exponent + 1 < UNITS.length && Math.round(Math.abs(count) / 1024 ** exponent) >= 1024) exponent += 1;
  const value = count / 1024 ** exponent;
  const digits = exponent > 0 && Math.abs(value) < 9.95 && Math.round(value * 10) % 10 !== 0 ? 1 : 0;
  return `${value.toFixed(digits)} ${UNITS[exponent]}`;
}

/** `3.1 ms`, `38 ms`, `0.11 s`, `2.4 s`, `3 min`. */
export function duration(seconds) {
  if (seconds < 0.0995) return milliseconds(seconds * 1000);
  if (seconds < 0.995) return `${seconds.toFixed(2)} s`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : age(seconds);
}

/** A latency in milliseconds up to ten seconds: `4.1 ms`, `812 ms`. */
export function latency(seconds) {
  return seconds < 9.9995 ? milliseconds(seconds * 1000) : `${seconds.toFixed(0)} s`;
}

/** The two largest units: `12 s`, `2 min`, `3 h 12 min`, `4 d 1 h`. */
export function age(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const minutes = Math.floor(whole / 60), hours = Math.floor(whole / 3600), days = Math.floor(whole / 86400);
  if (whole < 60) return `${whole} s`;
  if (hours < 1) return `${minutes} min`;
  return days < 1 ? `${hours} h ${minutes % 60} min` : `${days} d ${hours % 24} h`;
}

/** Two or three digits, thousands apart: `1,250`, `412`, `8.4`, `0.31`. */
export function number(value) {
  const size = Math.abs(value);
  if (size >= 99.5) return Math.round(value).toLocaleString("en");
  if (size >= 9.95) return value.toFixed(0);
  return size >= 0.995 || size === 0 ? trimmed(value, 1) : trimmed(value, 2);
}

export function percent(share) {
  return `${(share * 100).toFixed(0)} %`;
}

export function plural(count, noun) {
  return count === 1 ? `1 ${noun}` : `${count} ${noun}s`;
}

/** Local time of day: `14:03:27`. */
export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

/** `5.4 GB/s`, as `flexctl topology` has rates. */
export function rate(bytesPerSecond) {
  const value = bytesPerSecond / 1e9;
  return `${value >= 9.95 ? value.toFixed(0) : value >= 0.995 ? value.toFixed(1) : value.toFixed(2)} GB/s`;
}

/** The daemon's words with arrows as a page has them. */
export function arrows(text) {
  return text.replaceAll(" -> ", " \u2192 ");
}

/** The part of a UUID by which people tell devices apart; other names as they are. */
export function shortDevice(id, labels = {}) {
  return labels[id] ?? id.replace(/^((?:GPU|MIG)-[0-9a-f]{8})-.*$/, "$1");
}

/** `embedding, 0-3`: the layers of a stage in words. */
export function layersText(stage, isFirst, isLast) {
  const first = stage.first_decoder, last = stage.end_decoder - 1;
  const parts = isFirst ? ["embedding"] : [];
  if (last >= first) parts.push(first === last ? String(first) : `${first}-${last}`);
  if (isLast) parts.push("head");
  return parts.join(", ") || "none";
}

function milliseconds(value) {
  return value < 9.95 ? `${value.toFixed(1)} ms` : `${value.toFixed(0)} ms`;
}

function trimmed(value, digits) {
  return String(Number(value.toFixed(digits)));
}

// The data of the page, and functions that unpack the numbers of a trace.

const DATA = JSON.parse(document.getElementById("data").textContent);

const REGIMES = [
  { name: "lock", letter: "L", text: "the teacher is certain" },
  { name: "mid", letter: "M", text: "between certain and uncertain" },
  { name: "pivot", letter: "P", text: "uncertain here, certain again soon: weight is restored" },
  { name: "fork", letter: "F", text: "uncertain here and in the next tokens: weight is reduced" },
];

const VERDICTS = {
  correct: { glyph: "✓", tone: "good" },
  wrong: { glyph: "✗", tone: "bad" },
  truncated: { glyph: "…", tone: "dim" },
  unparsable: { glyph: "?", tone: "dim" },
  timeout: { glyph: "⧖", tone: "dim" },
};

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// A table of all half floats, as not every browser has Float16Array yet.
const HALVES = (() => {
  const table = new Float32Array(1 << 16);
  for (let i = 0; i < table.length; i += 1) {
    const sign = i & 0x8000 ? -1 : 1;
    const exponent = (i >> 10) & 31;
    const fraction = i & 1023;
    if (exponent === 0) table[i] = sign * fraction * 2 ** -24;
    else if (exponent === 31) table[i] = fraction ? NaN : sign * Infinity;
    else table[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return table;
})();

function halvesOf(text) {
  const bytes = bytesOf(text);
  const values = new Float32Array(bytes.length / 2);
  for (let i = 0; i < values.length; i += 1) values[i] = HALVES[bytes[2 * i] | (bytes[2 * i + 1] << 8)];
  return values;
}

function wordsOf(text) {
  const bytes = bytesOf(text);
  const view = new DataView(bytes.buffer);
  return Uint32Array.from({ length: bytes.length / 4 }, (_, i) => view.getUint32(4 * i, true));
}

const opened = new WeakMap();

const SIGNALS = ["entropy", "ahead", "student", "teacher", "delta", "magnitude", "gate", "restored", "weight"];

// The signals of a trace, unpacked once: tokens, regime, and one number per token for each of SIGNALS. Python computed all of them.
function signalsOf(trace) {
  if (!opened.has(trace)) {
    const found = { tokens: wordsOf(trace.tokens), regime: bytesOf(trace.regime) };
    for (const name of SIGNALS) found[name] = halvesOf(trace[name]);
    const kept = trace.alternatives;
    found.alternatives = kept && { count: kept.count, tokens: wordsOf(kept.tokens), logprobs: halvesOf(kept.logprobs) };
    opened.set(trace, found);
  }
  return opened.get(trace);
}

// The data of the page: runs, their indices of traces and groups, and blocks that are opened when somebody looks at one of them.

let DOC = JSON.parse(document.getElementById("data").textContent);
let DATA = null; // the run that is shown
let SERVED = null; // blocks that a server sent after this page was loaded

const REGIMES = [
  { name: "lock", letter: "L", text: "the teacher is certain" },
  { name: "mid", letter: "M", text: "between certain and uncertain" },
  { name: "pivot", letter: "P", text: "uncertain here, certain again soon: weight is restored" },
  { name: "fork", letter: "F", text: "uncertain here and in the next tokens: weight is reduced" },
];

// What each figure of a token is. The panel has these as titles, and the page below the text.
const FIGURES = {
  "entropy, nats": () => "how unsure the teacher is about this token; 0 is sure",
  lookahead: () => `lowest entropy of this token and the next ${DATA.window}`,
  "log p student": () => "log-prob that the student gives to the token; 0 is certain",
  "log p teacher": () => "log-prob that the teacher gives to the token",
  "log-ratio δ": () => "log p teacher − log p student: above 0 the teacher finds the token likelier",
  magnitude: () => "how far both are apart, in the direction of the advantage, bounded: 1 where they agree",
  gate: () => "what the teacher's entropy leaves of the weight, from 0 to 1",
  restored: () => "gate with looking ahead − gate without it: what a pivot gets back",
  "token weight": () => "advantage × magnitude × gate, as labels have it; a note above the text tells where training weighs otherwise",
  alignment: () => "in an audited round: how far a likelier token raises accuracy; below 0 it lowers it",
};
// What a trace without advantage is for the objective.
const SILENT = {
  needed: "such a trace teaches nothing",
  used: "such a trace teaches by the other terms of the loss alone",
  unread: "the objective reads no advantage, so such a trace teaches like any other",
};
const audited = () => DATA.audits.length > 0; // whether a round has an audit, which has the alignment of its tokens
const shownFigures = () => Object.entries(FIGURES).filter(([name]) => name !== "alignment" || audited());
const words = () => shownFigures().map(([name, text]) => [el("dt", {}, name), el("dd", {}, text())]);

const VERDICTS = {
  correct: { glyph: "✓", tone: "good" },
  wrong: { glyph: "✗", tone: "bad" },
  truncated: { glyph: "…", tone: "dim" },
  unparsable: { glyph: "?", tone: "dim" },
  timeout: { glyph: "⧖", tone: "dim" },
};
const verdictOf = (name) => VERDICTS[name] || { glyph: "–", tone: "dim" };

// An index that came column by column, as a list of objects.
function rowsOf(columns) {
  const names = Object.keys(columns);
  const size = names.length ? columns[names[0]].length : 0;
  return Array.from({ length: size }, (_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

function prepare() {
  DOC.runs.forEach((run, number) => {
    run.number = number;
    run.groups = rowsOf(run.sample.groups).map((group, index) => ({ ...group, index, run, members: [] }));
    run.traces = rowsOf(run.sample.traces).map((trace) => {
      const whole = { ...trace, group: run.groups[trace.group], run };
      Object.assign(whole, { round: whole.group.round, problem: whole.group.problem });
      whole.group.members.push(whole);
      return whole;
    });
    for (const group of run.groups) group.wrong = group.of - group.correct;
  });
  DATA = DOC.runs[0];
}
prepare();

// ---- blocks ------------------------------------------------------------------------------------------------------------

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// A table of all half floats, as not every browser has Float16Array yet.
const HALVES = (() => {
  const found = new Float32Array(1 << 16);
  for (let i = 0; i < found.length; i += 1) {
    const sign = i & 0x8000 ? -1 : 1;
    const exponent = (i >> 10) & 31;
    const fraction = i & 1023;
    if (exponent === 0) found[i] = sign * fraction * 2 ** -24;
    else if (exponent === 31) found[i] = fraction ? NaN : sign * Infinity;
    else found[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return found;
})();

const BLOCKS_KEPT = 24;
const opened = new Map(); // name of a block -> a promise of its head, bytes and sections; the last ones that were used

function openBlock(name) {
  const found = opened.get(name) ?? readBlock(name);
  opened.delete(name);
  opened.set(name, found);
  if (opened.size > BLOCKS_KEPT) opened.delete(opened.keys().next().value);
  return found;
}

async function readBlock(name) {
  const text = SERVED ? SERVED[name] : document.getElementById(name).textContent;
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const begin = 4 + new DataView(bytes.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, begin)));
  const sections = {};
  let at = begin;
  for (const [section, kind, size] of head.sections) {
    sections[section] = { kind, size, at };
    at += size * { u1: 1, f2: 2, u4: 4 }[kind];
  }
  return { head, bytes, sections };
}

// Numbers of one section, from byte planes.
function numbersOf({ bytes, sections }, name, start, size) {
  const { kind, size: all, at } = sections[name] ?? { kind: "u1", size: 0, at: 0 };
  if (kind === "u1") return bytes.subarray(at + start, at + start + size);
  const found = kind === "f2" ? new Float32Array(size) : new Uint32Array(size);
  for (let i = 0; i < size; i += 1) {
    const low = at + start + i;
    const half = bytes[low] | (bytes[low + all] << 8);
    found[i] = kind === "f2" ? HALVES[half] : half + bytes[low + 2 * all] * 65536 + bytes[low + 3 * all] * 16777216;
  }
  return found;
}

const SIGNALS = ["entropy", "ahead", "student", "teacher", "delta", "magnitude", "gate", "restored", "weight"];
const known_signals = new WeakMap();

// The signals and texts of a trace, opened once: words of its tokens, regime, and one number per token for each of SIGNALS.
// Python computed all of them.
async function signalsOf(trace) {
  if (known_signals.has(trace)) return known_signals.get(trace);
  const block = await openBlock(`block-${trace.run.number}-${trace.block}`);
  const own = block.head.traces[trace.place];
  const read = (name) => numbersOf(block, name, own.start, own.size);
  const found = { tokens: read("tokens"), regime: read("regime"), ...own, context: promptOf(block, own.context) };
  for (const name of SIGNALS) found[name] = read(name);
  if (own.aligned_start !== undefined) found.alignment = numbersOf(block, "alignment", own.aligned_start, own.size);
  if (own.kept) {
    const kept = (name) => numbersOf(block, name, own.kept_start, own.kept * own.size);
    found.alternatives = { count: own.kept, tokens: kept("kept_tokens"), probs: kept("kept_probs") };
  }
  Object.assign(found, groupOf(block, trace));
  known_signals.set(trace, found);
  return found;
}

// The texts and prompts of a trace's problem.
function groupOf(block, trace) {
  let last = 0;
  const own = block.head.groups.find((group) => (last += group.traces) > trace.place);
  const prompts = { prompt: promptOf(block, own.prompt), teacher_prompt: promptOf(block, own.teacher_prompt) };
  return { problem: own.problem, answer: own.answer, solution: own.solution, ...prompts };
}

const promptOf = (block, place) =>
  place && { words: numbersOf(block, "prompts", place.start, place.shown), size: place.size };

// The full texts of all traces, for the search. They are read once.
const searchable = new WeakMap();
function readTexts(run) {
  if (!searchable.has(run)) searchable.set(run, readAll(run));
  return searchable.get(run);
}

async function readAll(run) {
  for (let number = 0; number < run.sample.blocks; number += 1) {
    const { head } = await readBlock(`block-${run.number}-${number}`);
    const problems = head.groups.flatMap((group) => Array(group.traces).fill(group.problem));
    head.traces.forEach((trace, place) => (trace.problem = problems[place]));
    for (const trace of run.traces)
      if (trace.block === number)
        trace.searched = `${trace.id} ${head.traces[trace.place].problem} ${head.traces[trace.place].text}`.toLowerCase();
  }
  run.searched = true;
}

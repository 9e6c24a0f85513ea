// The list of traces: filters, order, and the open trace.

const ORDERS = {
  round: ["Round", (a, b) => a.round - b.round || a.group.index - b.group.index || a.sample - b.sample],
  restored: ["Most restored weight", (a, b) => b.restored_sum - a.restored_sum],
  pivots: ["Most pivots", (a, b) => b.pivots - a.pivots],
  forks: ["Most forks", (a, b) => b.forks - a.forks],
  longest: ["Longest", (a, b) => b.length - a.length],
  shortest: ["Shortest", (a, b) => a.length - b.length],
  entropy: ["Highest mean entropy", (a, b) => b.mean - a.mean],
  update: ["Largest weight", (a, b) => b.update - a.update],
  advantage: ["Highest advantage", (a, b) => b.advantage - a.advantage],
};

// Rows whose trace has the words of the search. Until all texts are read, ids and the beginnings of problems are searched.
const matches = (query) => (trace) =>
  (trace.searched ?? `${trace.id} ${trace.problem}`.toLowerCase()).includes(query.trim().toLowerCase());

function filteredTraces() {
  return DATA.traces
    .filter((t) => !at.verdict || t.verdict === at.verdict)
    .filter((t) => !at.round || String(t.round) === at.round)
    .filter(at.q ? matches(at.q) : () => true)
    .sort((ORDERS[at.order] ?? ORDERS.round)[1]);
}

const named = (choices) => Object.entries(choices).map(([key, [text]]) => [key, text]);

const roundChoices = (rows) => [
  ["", "any"],
  ...[...new Set(rows.map((row) => row.round))].sort((a, b) => a - b).map((round) => [String(round), String(round)]),
];

function searchField() {
  const read = (event) => go({ q: event.target.value });
  const input = el("input", { type: "search", placeholder: "text or id", value: at.q, "data-name": "q", oninput: read });
  return el("label", { class: "field wide" }, el("span", {}, "Search"), input);
}

// A search reads the texts of all traces once. Returns what is said meanwhile.
function searching() {
  if (!at.q || DATA.searched) return "";
  readTexts(DATA).then(route);
  return "; reading all texts …";
}

// A view without traces says why there are none.
function nothingHere() {
  const total = DATA.ledger.total;
  const rejected = Object.values(total.rejected).flatMap((reasons) => Object.entries(reasons));
  const every = total.traces > 0 && total.num_rejected >= total.traces;
  const why = every
    ? `All ${count(total.traces)} traces of this run were rejected: ${rejected.map(([r, n]) => `${r.replaceAll("_", " ")} ${count(n)}`).join(", ")}. The Run view has examples.`
    : "No round of this run is labelled yet. The Run view shows what is there.";
  return el("div", { class: "card" }, el("h2", {}, every ? "Every trace was rejected" : "No labelled traces"), el("p", {}, why));
}

function sampleNote() {
  const { sample } = DATA;
  const shown = DATA.traces.length;
  return shown < sample.labelled
    ? `A sample: ${count(shown)} of ${count(sample.labelled)} labelled traces (${count(sample.shown_tokens)} of ${count(sample.labelled_tokens)} tokens) in whole groups, or single traces of very long ones, even over ${count(sample.strata)} strata of round and verdicts. Rare verdicts are therefore more frequent than in the run. The same run gives the same sample.`
    : `All ${count(sample.labelled)} labelled traces, ${count(sample.labelled_tokens)} tokens.`;
}

function tracesView(root) {
  if (!DATA.traces.length) return void root.append(nothingHere());
  const verdicts = Object.keys(VERDICTS).filter((v) => DATA.traces.some((t) => t.verdict === v));
  const list = pickList({ label: "Traces", render: traceItem, open: (trace) => openHash(trace, null), isOpen: (t) => t.id === at.trace });
  const side = el(
    "aside",
    { class: "side card", "aria-label": "Pick a trace" },
    el(
      "div",
      { class: "fields" },
      bound("Verdict", "verdict", [["", "any"], ...verdicts.map((v) => [v, `${VERDICTS[v].glyph} ${v}`])]),
      bound("Round", "round", roundChoices(DATA.traces)),
      bound("Order", "order", named(ORDERS), DEFAULTS.order, true),
      searchField(),
    ),
    list.found,
    list.items,
    el("p", { class: "fine" }, sampleNote()),
  );
  root.append(el("div", { class: "workbench" }, side, el("div", { id: "reader", class: "reader" })));
  root.list = list;
}

function updateTraces(root) {
  if (!DATA.traces.length) return;
  const rows = filteredTraces();
  const trace = DATA.traces.find((t) => t.id === at.trace) ?? firstOf(rows);
  at.trace = trace?.id ?? "";
  root.list.fill(rows, "trace", searching());
  if (trace) return openTrace(trace, /^\d+$/.test(at.token || "") ? Number(at.token) : null);
}

// What is open when nobody has chosen a trace: in the order of rounds the first one that taught something, best with a pivot.
function firstOf(rows) {
  const taught = at.order === DEFAULTS.order ? rows.filter((t) => t.advantage && t.update) : [];
  return taught.find((t) => t.pivots) ?? taught[0] ?? rows[0];
}

const many = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

function traceItem(trace) {
  const verdict = verdictOf(trace.verdict);
  return [
    el("span", { class: `verdict ${verdict.tone}`, "aria-hidden": "true" }, verdict.glyph),
    el("span", { class: "what" }, el("span", { class: "unseen" }, `${trace.verdict}. `), foreign(trace.problem.slice(0, 120))),
    el(
      "span",
      { class: "facts" },
      `round ${trace.round} · ${count(trace.length)} tokens · advantage\u00a0${signed(trace.advantage, 2)}`,
      el("br"),
      `${many(trace.pivots, "pivot")} · ${many(trace.forks, "fork")} · restored\u00a0${signed(trace.restored_sum, 2)}`,
    ),
  ];
}

// Look at a trace, and at one of its tokens.
function openHash(trace, token) {
  const run = trace.run.number ? String(trace.run.number) : "0";
  go({ view: "traces", run, trace: trace.id, token: token === null ? "" : String(token) }, { push: true });
  if (token === null) reveal(document.getElementById("reader"));
}

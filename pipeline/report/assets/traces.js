// The list of traces: filters, order, and the open trace.

const ORDERS = {
  round: ["Round", (a, b) => a.round - b.round || (a.id < b.id ? -1 : 1)],
  restored: ["Most restored weight", (a, b) => b.restored_sum - a.restored_sum],
  pivots: ["Most pivots", (a, b) => b.pivots - a.pivots],
  forks: ["Most forks", (a, b) => b.forks - a.forks],
  longest: ["Longest", (a, b) => b.length - a.length],
  shortest: ["Shortest", (a, b) => a.length - b.length],
  entropy: ["Highest mean entropy", (a, b) => b.mean - a.mean],
};
const MORE = 60;

const view = { verdict: "", round: "", order: "restored", query: "", shown: MORE, trace: null, list: [] };

function filtered() {
  const query = view.query.trim().toLowerCase();
  return DATA.sample.traces
    .filter((t) => !view.verdict || t.verdict === view.verdict)
    .filter((t) => view.round === "" || String(t.round) === view.round)
    .filter(
      (t) =>
        !query ||
        t.id.includes(query) ||
        t.problem.toLowerCase().includes(query) ||
        t.text.toLowerCase().includes(query),
    )
    .sort(ORDERS[view.order][1]);
}

function tracesView(root) {
  const sample = DATA.sample;
  if (!sample.traces.length) {
    root.append(
      el(
        "div",
        { class: "card" },
        el("h2", {}, "No labelled traces"),
        el("p", {}, "No round of this run is labelled yet. The Run view shows what is there."),
      ),
    );
    return;
  }
  const verdicts = Object.keys(VERDICTS).filter((v) => sample.traces.some((t) => t.verdict === v));
  const rounds = [...new Set(sample.traces.map((t) => t.round))].sort((a, b) => a - b);
  const items = el("ol", { class: "items", onkeydown: moveInList });
  const found = el("p", { class: "found", role: "status" });
  const refresh = () => {
    view.shown = MORE;
    listTraces(items, found);
  };
  const set = (name) => (value) => {
    view[name] = value;
    refresh();
  };
  const search = el("input", {
    type: "search",
    placeholder: "text or id",
    oninput: (e) => set("query")(e.target.value),
  });
  const part = sample.traces.length < sample.labelled;
  const side = el(
    "aside",
    { class: "side card", "aria-label": "Pick a trace" },
    el(
      "div",
      { class: "fields" },
      choice(
        "Verdict",
        [["", "any"], ...verdicts.map((v) => [v, `${VERDICTS[v].glyph} ${v}`])],
        view.verdict,
        set("verdict"),
      ),
      choice("Round", [["", "any"], ...rounds.map((r) => [String(r), String(r)])], view.round, set("round")),
      choice(
        "Order",
        Object.entries(ORDERS).map(([key, [text]]) => [key, text]),
        view.order,
        set("order"),
      ),
      el("label", { class: "field" }, el("span", {}, "Search"), search),
    ),
    found,
    items,
    el(
      "p",
      { class: "fine" },
      part
        ? `A sample: ${count(sample.traces.length)} of ${count(sample.labelled)} labelled traces (${count(sample.shown_tokens)} of ${count(sample.labelled_tokens)} tokens), even over ${count(sample.strata)} strata of round and verdict. Rare verdicts are therefore more frequent than in the run. The same run gives the same sample.`
        : `All ${count(sample.labelled)} labelled traces, ${count(sample.labelled_tokens)} tokens.`,
    ),
  );
  root.append(el("div", { class: "workbench" }, side, el("div", { id: "reader", class: "reader" })));
  view.refresh = () => listTraces(items, found);
  refresh();
}

function listTraces(items, found) {
  view.list = filtered();
  found.textContent = `${count(view.list.length)} ${view.list.length === 1 ? "trace" : "traces"}`;
  const rest = view.list.length - view.shown;
  items.replaceChildren(
    ...view.list.slice(0, view.shown).map(traceItem),
    ...(rest > 0
      ? [
          el(
            "li",
            {},
            el(
              "button",
              {
                class: "more",
                type: "button",
                onclick: () => {
                  const before = view.shown;
                  view.shown += MORE;
                  view.refresh();
                  items.children[before].querySelector("button").focus();
                },
              },
              `Show ${count(Math.min(rest, MORE))} more`,
            ),
          ),
        ]
      : []),
  );
}

function traceItem(trace) {
  const verdict = VERDICTS[trace.verdict] || { glyph: "?", tone: "dim" };
  return el(
    "li",
    {},
    el(
      "button",
      {
        type: "button",
        class: "item",
        "data-id": trace.id,
        "aria-current": view.trace === trace ? "true" : null,
        onclick: () => openHash(trace, null),
      },
      el("span", { class: `verdict ${verdict.tone}`, "aria-hidden": "true" }, verdict.glyph),
      el(
        "span",
        { class: "what" },
        el("span", { class: "unseen" }, `${trace.verdict}. `),
        foreign(trace.problem.slice(0, 120)),
      ),
      el(
        "span",
        { class: "facts" },
        `round ${trace.round} · ${count(trace.length)} tokens · ${trace.pivots} P · ${trace.forks} F · ${signed(trace.restored_sum, 2)}`,
      ),
    ),
  );
}

function moveInList(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

function openHash(trace, token) {
  const hash = `#trace=${encodeURIComponent(trace.id)}${token === null ? "" : `&token=${token}`}`;
  if (location.hash === hash) openTrace(trace, token);
  else location.hash = hash;
}

function neighbour(step) {
  const at = view.list.indexOf(view.trace);
  const next = view.list[at + step];
  if (next) openHash(next, null);
}

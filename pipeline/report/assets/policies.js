// Policies: the same held-out problem answered by two policies, sorted by what changed.

const MOVED = { won: ["won", (r) => r.moved > 0], lost: ["lost", (r) => r.moved < 0], same: ["no better, no worse", (r) => r.moved === 0] };
const SORTED = {
  moved: ["What changed most", (x, y) => Math.abs(y.moved) - Math.abs(x.moved) || x.moved - y.moved || Math.abs(y.longer) - Math.abs(x.longer)],
  lost: ["Lost first", (x, y) => x.moved - y.moved || x.place - y.place],
  longer: ["Grew longest", (x, y) => y.longer - x.longer],
  shorter: ["Grew shortest", (x, y) => x.longer - y.longer],
  place: ["As asked", (x, y) => x.place - y.place],
};

// Everybody who answered held-out problems: each policy of each run.
function answerers() {
  return DOC.runs.flatMap((run) =>
    (run.answers?.policies ?? []).map((policy, column) => ({
      key: `${run.number}.${policy}`,
      name: `${DOC.runs.length > 1 ? `${run.run.folder}: ` : ""}policy ${policy}${policy === 0 ? " (base)" : ""}`,
      run,
      policy,
      column,
      places: (run.places ??= new Map((run.answers?.keys ?? []).map((key, place) => [key, place]))),
    })),
  );
}

function chosenPair() {
  const all = answerers();
  const own = all.filter((one) => one.run === DATA);
  const [first, last] = [own[0] ?? all[0], own[own.length - 1] ?? all[all.length - 1]];
  const rival = all.findLast((one) => one.run !== DATA && own.length && first.run.answers.keys.some((key) => one.places.has(key)));
  const a = all.find((one) => one.key === at.a) ?? (rival ? last : first);
  const b = all.find((one) => one.key === at.b) ?? rival ?? last;
  return { all, a, b };
}

/** What changed between two policies; null where one of them has no answer, since all of its rows were rejected. */
const gap = (before, after) => (before == null || after == null ? null : after - before);

function pairRows({ a, b }) {
  const rows = [];
  a.run.answers.keys.forEach((key, place) => {
    const other = b.places.get(key);
    if (other === undefined) return;
    const of = (one, name, spot) => one.run.answers[name][one.column][spot];
    const [before, after] = [of(a, "correct", place), of(b, "correct", other)];
    const [short, long] = [of(a, "length", place), of(b, "length", other)];
    const cut = [of(a, "truncated", place), of(b, "truncated", other)];
    rows.push({ key, place, other, before, after, short, long, cut, moved: gap(before, after), longer: gap(short, long), problem: a.run.answers.problems[place] });
  });
  return rows;
}

function policiesView(root) {
  const { all, a, b } = chosenPair();
  if (all.length < 2) {
    root.append(
      missing("Two policies on one problem", "Fewer than two policies have answered the held-out problems. `egrsd distill` asks the first and the last one:", "egrsd distill --run RUN --set evaluation.problems=100"),
    );
    return;
  }
  const names = all.map((one) => [one.key, visible(one.name)]);
  const list = pickList({
    label: "Problems",
    render: problemItem,
    open: (row) => {
      go({ problem: row.key }, { push: true });
      reveal(document.getElementById("pair"));
    },
    isOpen: (row) => row.key === at.problem,
  });
  const search = el("input", { type: "search", placeholder: "problem", value: at.q, "data-name": "q", oninput: (e) => go({ q: e.target.value }) });
  const side = el(
    "aside",
    { class: "side card", "aria-label": "Pick a problem" },
    el(
      "div",
      { class: "fields" },
      bound("Before", "a", names, a.key, true),
      bound("After", "b", names, b.key, true),
      bound("Change", "moved", [["", "any"], ...named(MOVED)], "", true),
      bound("Order", "sorted", named(SORTED), DEFAULTS.sorted, true),
      el("label", { class: "field wide" }, el("span", {}, "Search"), search),
    ),
    list.found,
    list.items,
    el("p", { class: "fine" }, "✓ right, ✗ wrong, … cut off at the limit of tokens (counts as wrong)"),
  );
  root.append(el("div", { class: "workbench" }, side, el("div", { id: "pair", class: "stack" })));
  root.list = list;
}

function updatePolicies(root) {
  const pair = chosenPair();
  if (pair.all.length < 2) return;
  const every = pairRows(pair);
  const query = (at.q || "").trim().toLowerCase();
  const rows = every
    .filter((row) => !at.moved || MOVED[at.moved]?.[1](row))
    .filter((row) => !query || row.problem.toLowerCase().includes(query))
    .sort((SORTED[at.sorted] ?? SORTED.moved)[1]);
  const row = every.find((one) => one.key === at.problem) ?? rows[0];
  at.problem = row?.key ?? "";
  const counted = (test) => count(every.filter(test).length);
  root.list.fill(rows, "problem", `; of ${count(every.length)}: ${counted(MOVED.won[1])} won, ${counted(MOVED.lost[1])} lost`);
  root.list.draw(); // the same problems look otherwise under other policies
  const holder = document.getElementById("pair");
  if (!row)
    return void holder.replaceChildren(el("p", { class: "card none" }, every.length ? "No problem is left by these filters." : "These two answered different problems."));
  return drawPair(row, pair, holder);
}

// One sign for the samples of a problem: all right, all cut off at the limit of tokens, none right; else the share that is right.
const share = (value, cut) => (value === 1 ? "✓" : value === 0 ? (cut === 1 ? "…" : "✗") : known(value) ? percent(value, 0) : "–");
const moveOf = (row) => `${share(row.before, row.cut[0])} → ${share(row.after, row.cut[1])}`;
const wordOf = (row) => (row.moved === null ? "not answered" : row.moved > 0 ? "won" : row.moved < 0 ? "lost" : "unchanged");

const problemItem = (row) => [
  el("span", { class: `verdict ${row.moved > 0 ? "good" : row.moved < 0 ? "bad" : "dim"}`, "aria-hidden": "true" }, row.moved === null ? "–" : row.moved > 0 ? "▲" : row.moved < 0 ? "▼" : "="),
  el("span", { class: "what" }, el("span", { class: "unseen" }, `${wordOf(row)}. `), foreign(row.problem.slice(0, 120))),
  el("span", { class: "facts" }, `${moveOf(row)} · ${count(row.short)} → ${count(row.long)} tokens`),
];

async function drawPair(row, { a, b }, holder) {
  const read = async (one, place) => {
    const { block } = one.run.answers;
    const { head } = await openBlock(`answers-${one.run.number}-${Math.floor(place / block)}`);
    const problem = head.problems[place % block];
    return { ...problem, answers: problem.answers[one.column] };
  };
  const [before, after] = await Promise.all([read(a, row.place), read(b, row.other)]);
  if (at.view !== "policies" || at.problem !== row.key) return;
  const alike = (one, other) => {
    const [x, y] = [[...one.text], [...other.text]];
    let i = 0;
    while (i < x.length && x[i] === y[i]) i += 1;
    const inWord = (text) => i > 0 && i < text.length && /[\p{L}\p{N}]/u.test(text[i]) && /[\p{L}\p{N}]/u.test(text[i - 1]);
    while (inWord(x) || inWord(y)) i -= 1; // whole words only: "The" and "To" have nothing in common
    return x.slice(0, i).join("");
  };
  const column = (one, said, others) =>
    el(
      "section",
      { class: "card policy", "aria-label": one.name },
      el("h3", {}, foreign(one.name)),
      said.answers.map((answer, k) => {
        const verdict = verdictOf(answer.verdict);
        const shared = others[k] ? alike(answer, others[k]) : "";
        return el(
          "div",
          { class: "answer" },
          el(
            "p",
            { class: "chips" },
            chip(`${verdict.glyph} ${answer.verdict ?? "rejected"}`, verdict.tone),
            answer.extracted ? chip(["read ", foreign(answer.extracted)]) : null,
            chip(`${count(answer.length)} tokens`),
          ),
          el("pre", {}, shared ? el("span", { class: "alike" }, foreign(shared)) : null, foreign(answer.text.slice(shared.length))),
        );
      }),
    );
  holder.replaceChildren(
    el(
      "article",
      { class: "card trace" },
      el(
        "header",
        {},
        el("p", { class: "eyebrow" }, `Held-out problem ${row.place + 1} · ${wordOf(row)}`),
        el("h2", {}, foreign(before.problem)),
        el("p", { class: "chips" }, chip(["reference ", foreign(before.answer)]), chip(moveOf(row)), chip(`${count(row.short)} → ${count(row.long)} tokens`)),
        el("p", { class: "fine" }, "Grey words stand in both answers, up to where they part."),
      ),
      el("div", { class: "pair" }, column(a, before, after.answers), column(b, after, before.answers)),
      el(
        "p",
        { class: "turn" },
        el("button", { type: "button", onclick: () => stepBy(-1) }, "← Previous problem"),
        el("button", { type: "button", onclick: () => stepBy(1) }, "Next problem →"),
      ),
    ),
  );
}

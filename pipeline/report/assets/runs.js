// Several runs in one page: their results, their differences, the settings in which they differ, and their curves.

const FEW = 8; // settings that a phone shows at once

function runsView(root) {
  const [first] = DOC.runs;
  const interval = (e, f) => (e ? `${f(e.value)} [${f(e.low)}, ${f(e.high)}]` : "–");
  const points = (v) => signed(100 * v, 1);
  const words = (v) => fixed(v, 1);
  const name = (run) => foreign(run.run.folder);
  const results = DOC.runs.map((run) => {
    const [before, last] = [run.evaluations[0], run.evaluations[run.evaluations.length - 1]];
    const after = last === before ? null : last; // a run at work has evaluated its base alone
    return [
      name(run),
      foreign(run.run.called),
      String(run.rounds.length),
      count(run.ledger.total.traces),
      after ? interval(before.accuracy, percent) : "–",
      after ? interval(after.accuracy, percent) : "–",
      after ? interval(after.length, words) : "–",
    ];
  });
  const against = DOC.against.map((change, i) => [
    el("span", {}, name(DOC.runs[i + 1]), " − ", name(first)),
    ...(change
      ? [`${interval(change.accuracy, points)} points`, `${interval(change.length, (v) => signed(v, 1))} tokens`, count(change.better), count(change.worse), count(change.problems)]
      : ["not on the same problems, not with the settings of now, or not trained yet", "–", "–", "–", "–"]),
  ]);
  const settings = DOC.settings.map((row) => [foreign(row.name), ...row.values.map((value) => el("code", {}, foreign(value)))]);
  const numbers = [...new Set(DOC.runs.flatMap((run) => run.rounds.map((r) => r.round)))].sort((x, y) => x - y);
  const curve = ([title, note, pick, options]) =>
    chart({
      title,
      note,
      names: numbers.map(String),
      xTitle: "round",
      kind: "line",
      series: DOC.runs.map((run, k) => ({
        name: visible(run.run.folder),
        tone: `s${k % 8}`,
        values: numbers.map((number) => pick(run.rounds.find((r) => r.round === number) ?? {})),
      })),
      ...options,
    });
  fill(root, {}, [
    el(
      "section",
      { class: "card" },
      el("h2", {}, "Runs"),
      table("Results", ["run", "made from", "rounds", "traces", "accuracy before", "accuracy after", "length after"], results, { hideCaption: true, words: [1] }),
      table("Last policies, paired by held-out problem", ["runs", "accuracy", "length", "better", "worse", "problems"], against),
      el("p", { class: "fine" }, withCode("95 % intervals over problems. One run of each says nothing about other seeds: `egrsd compare` does.")),
      el("p", {}, el("a", { href: "#policies" }, "Problem by problem"), " in the view Policies."),
    ),
    el(
      "details",
      { class: "card chapter", open: settings.length <= FEW || !isPhone() },
      el("summary", {}, el("h2", {}, `Settings that differ: ${settings.length || "none"}`)),
      settings.length
        ? table("Settings that differ", ["setting", ...DOC.runs.map(name)], settings, { hideCaption: true, words: DOC.runs.map((_, k) => k + 1) })
        : null,
    ),
    el("h2", {}, "By round"),
    el("div", { class: "charts" }, CURVES.slice(0, 3).map(curve)),
    chapter("Optimiser, entropy and speed", !isPhone(), CURVES.slice(3).map(curve)),
  ]);
}

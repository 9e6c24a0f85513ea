// The view Evidence: accuracy and length of a comparison, the sweep over label settings, and figures by entropy decile.

const brief = (name) => name.split(".").pop();

function evidenceView(root) {
  const compared = DOC.compare?.points.length;
  root.append(compared ? compareCard() : "", ...sweepCards(), ...auditCards(DATA.audits), compared ? "" : compareCard());
}

function missing(title, text, command) {
  return el(
    "section",
    { class: "card" },
    el("h2", {}, title),
    el("p", { class: "none" }, text),
    el("pre", { class: "command" }, command),
  );
}

function compareCard() {
  const found = DOC.compare;
  if (!found || !found.points.length)
    return missing(
      "Accuracy and length",
      "No comparison is in this report. Train several objectives, then name the folder:",
      "egrsd compare --recipe demo --out DIR\negrsd report --run RUN --compare DIR",
    );
  const interval = (e, f) => `${f(e.value)} [${f(e.low)}, ${f(e.high)}]`;
  const words = (v) => fixed(v, 1);
  const rows = found.points.map((p) => [
    foreign(p.objective),
    known(p.seed) ? String(p.seed) : "–",
    interval(p.accuracy, percent),
    interval(p.length, words),
  ]);
  const means = (found.objectives || [])
    .filter((o) => known(o?.accuracy?.value))
    .map((o) => [
      foreign(o.objective ?? o.name ?? ""),
      String(o.seeds?.length ?? "–"),
      interval(o.accuracy, percent),
      o.length ? interval(o.length, words) : "–",
    ]);
  return el(
    "section",
    { class: "card" },
    el("h2", {}, "Accuracy and length"),
    el(
      "p",
      { class: "soft" },
      "Up and to the left is better. A small mark is one run, with its 95 % interval over problems. A large mark is the mean of an objective, with its 95 % interval over seeds and problems. Intervals are cut at 0 and at 100 %.",
    ),
    el(
      "div",
      { class: "two" },
      frontier(found),
      el(
        "div",
        { class: "stack" },
        means.length ? table("Means by objective", ["objective", "seeds", "accuracy", "length, tokens"], means) : null,
        pairTable(found.pairs || []),
      ),
    ),
    tableBelow("Runs", ["objective", "seed", "accuracy", "length, tokens"], rows, { summary: "Every run" }),
  );
}

// Differences to the baseline, and whether each is beyond noise.
function pairTable(pairs) {
  const rows = pairs
    .filter((p) => p && known(p.value))
    .map((p) => {
      const show = (v) => (p.measure === "accuracy" ? `${signed(100 * v, 1)} pt` : signed(v, 1));
      const said = p.beyond_noise === true ? "beyond noise" : p.beyond_noise === false ? "within noise" : "not tested";
      return [
        foreign(`${p.objective} − ${p.baseline}`),
        foreign(p.measure ?? ""),
        known(p.low) ? `${show(p.value)} [${show(p.low)}, ${show(p.high)}]` : show(p.value),
        known(p.p_holm) ? short(p.p_holm) : "–",
        said,
      ];
    });
  return rows.length
    ? table(
        "Paired differences, 95 % interval, p by Holm",
        ["objectives", "measure", "difference", "p", "result"],
        rows,
        { words: [1, 4] },
      )
    : null;
}

function sweepCards() {
  const sweep = DATA.sweep;
  if (!sweep || !sweep.points.length)
    return [
      missing(
        "What other gates would do",
        "No sweep of this run is stored. It needs no engine. Gradients of a model above some million parameters take minutes; --sample 0 leaves them out:",
        "egrsd sweep --run RUN",
      ),
    ];
  const axes = Object.keys(sweep.axes);
  const name = (p) => axes.map((a) => `${brief(a)} ${p.settings[a]}`).join(", ") || "stored settings";
  const restoredSpread = Math.max(1e-9, ...sweep.points.flatMap((p) => p.restored).filter(known));
  const heat = (v) =>
    known(v)
      ? el("span", { class: `cell h${Math.round(10 * Math.sqrt(Math.max(0, v) / restoredSpread))}` }, signed(v))
      : "–";
  const rows = sweep.points.map((p) => [
    name(p),
    ...p.restored.map(heat),
    ...p.factors.map((v) => fixed(v, 2)),
    fixed(p.kept),
    percent(p.effective_share),
    signed(p.correlation, 2),
    fixed(p.cosine_mean, 4),
  ]);
  const letters = REGIMES.map((r) => r.letter);
  const shares = new Map(sweep.points.map((p) => [p.shares.join(), p]));
  return [
    el(
      "section",
      { class: "card" },
      el("h2", {}, "What other gates would do"),
      el(
        "p",
        { class: "soft" },
        `${count(sweep.points.length)} settings of the labels on ${count(sweep.tokens)} stored tokens of ${count(sweep.traces)} traces, without new traces. Restored is the mean of ω(lookahead) − ω(entropy). Weight is the mean of magnitude × gate. Kept is the sum of |token weights| as a share of that at γ = 0. Effective is Kish's effective share of tokens. Correlation is between weight and |δ|. Cosine is between the gradient and the gradient at γ = 0.`,
      ),
      table(
        "Sweep",
        [
          "settings",
          ...letters.map((l) => `restored ${l}`),
          ...letters.map((l) => `weight ${l}`),
          "kept",
          "effective",
          "correlation",
          "cosine",
        ],
        rows,
        { hideCaption: true },
      ),
      tableBelow(
        "Regime shares",
        ["settings", ...REGIMES.map((r) => `${r.letter} ${r.name}`)],
        [...shares.values()].map((p) => [name(p), ...p.shares.map((v) => percent(v, 2))]),
        { summary: "Regime shares" },
      ),
    ),
    decileCard(sweep, name),
  ];
}

function decileCard(sweep, name) {
  const names = sweep.deciles.tokens.map((_, i) => String(i + 1));
  const holder = el("div", { class: "charts two-up" });
  const draw = (index) => {
    const [point, flat] = [sweep.points[index], sweep.points.find((p) => p.settings["label.gamma"] === 0)];
    holder.replaceChildren(
      chart({
        title: "|δ| by entropy decile",
        note: "mean, nats; decile 10 has the highest teacher entropy",
        names,
        xTitle: "decile",
        kind: "bars",
        series: [{ name: "|δ|", tone: "s3", values: sweep.deciles.delta }],
      }),
      chart({
        title: "Weight by entropy decile",
        note: `mean magnitude × gate at ${name(point)}${flat && flat !== point ? `, and at ${name(flat)}` : ""}`,
        names,
        xTitle: "decile",
        kind: "line",
        series: [
          { name: "this point", tone: "s0", values: point.decile_factors },
          ...(flat && flat !== point ? [{ name: "γ 0", tone: "s1", values: flat.decile_factors }] : []),
          { name: "its gate", tone: "s2", values: point.decile_gates },
        ],
      }),
      chart({
        title: "Teacher entropy by decile",
        note: "mean, nats",
        names,
        xTitle: "decile",
        kind: "bars",
        series: [{ name: "entropy", tone: "s2", values: sweep.deciles.entropy }],
      }),
    );
  };
  const strongest = sweep.points.reduce((best, p, i) => (p.kept < sweep.points[best].kept ? i : best), 0);
  draw(strongest);
  return el(
    "section",
    { "aria-labelledby": "deciles" },
    el(
      "div",
      { class: "split" },
      el("h2", { id: "deciles" }, "Entropy, δ and weight"),
      choice(
        "Settings",
        sweep.points.map((p, i) => [String(i), name(p)]),
        String(strongest),
        (v) => draw(Number(v)),
      ),
    ),
    holder,
  );
}

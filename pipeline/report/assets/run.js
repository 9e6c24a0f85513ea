// The view Run: charts by round, and the ledger from source to loss.

function runView(root) {
  const rounds = DATA.rounds;
  const names = rounds.map((r) => String(r.round));
  const line = (title, note, series, options = {}) =>
    chart({
      title,
      note,
      names,
      xTitle: "round",
      kind: "line",
      series: series.map(([name, tone, pick]) => ({ name, tone, values: rounds.map(pick) })),
      ...options,
    });
  const share = { format: percentTick, low: 0 };
  const stages = [...new Set(rounds.flatMap((r) => Object.keys(r.stages)))];
  fill(root, {}, [
    tiles(),
    ledgerCard(),
    el("h2", {}, "By round"),
    el(
      "div",
      { class: "charts" },
      line("Accuracy", "share of correct traces among those that no stage rejected", [["accuracy", "s0", (r) => r.accuracy]], {
        format: percentTick,
      }),
      line("Reward", "mean, length-shaped", [["reward", "s0", (r) => r.reward]]),
      line("Length", "mean response, tokens", [["length", "s0", (r) => r.length]]),
      line("Truncated", "share of traces that reached the limit of tokens", [["truncated", "s1", (r) => r.truncated]], share),
      chart({
        title: "Verdicts",
        note: "traces",
        names,
        xTitle: "round",
        kind: "bars",
        format: count,
        series: Object.keys(VERDICTS)
          .filter((v) => rounds.some((r) => r.verdicts[v]))
          .map((v) => ({
            name: `${VERDICTS[v].glyph} ${v}`,
            tone: `v-${v}`,
            values: rounds.map((r) => r.verdicts[v]),
          })),
      }),
      chart({
        title: "Regimes",
        note: "share of tokens",
        names,
        xTitle: "round",
        kind: "bars",
        format: percentTick,
        high: 1,
        series: REGIMES.map((g, k) => ({
          name: `${g.letter} ${g.name}`,
          tone: `g-${g.name}`,
          values: rounds.map((r) => r.shares?.[k] ?? null),
        })),
      }),
      line("Teacher entropy", "mean over tokens, nats", [["entropy", "s2", (r) => r.entropy]], { zero: true }),
      line("Teacher against student", "mean |δ| over tokens, nats", [["|δ|", "s3", (r) => r.delta]], { zero: true }),
      line(
        "Engine against trainer",
        "|log-prob gap| in nats: mean and largest in the trainer's first step, and largest in a sample that engines scored again",
        [
          ["mean", "s0", (r) => r.trainer_gap],
          ["largest", "s1", (r) => r.trainer_gap_max],
          ["scored again", "s2", (r) => r.rescore_gap],
        ],
        { zero: true },
      ),
      line("Staleness", "rounds by which the policy that wrote the traces is behind the round", [["lag", "s4", (r) => r.lag]], {
        zero: true,
        format: (v) => short(v),
      }),
      chart({
        title: "Seconds by stage",
        note: "work of each stage, summed over shards, and training",
        names,
        xTitle: "round",
        kind: "bars",
        series: [
          ...stages.map((s, k) => ({ name: s, tone: `s${k % 8}`, values: rounds.map((r) => r.stages[s] ?? null) })),
          { name: "training", tone: "s7", values: rounds.map((r) => r.seconds_train) },
        ],
      }),
      line(
        "Engines",
        "seconds: the whole round, the work of the busiest engine, and idle time summed over engines",
        [
          ["round", "s0", (r) => r.seconds_round],
          ["busiest", "s2", (r) => r.seconds_engines],
          ["idle", "s1", (r) => r.seconds_engines_idle],
        ],
        { zero: true },
      ),
    ),
    rejectedCard(),
    el(
      "details",
      { class: "card below" },
      el("summary", {}, "Settings and versions"),
      el("pre", {}, foreign(DATA.settings)),
      el(
        "pre",
        {},
        foreign(
          Object.entries(DATA.run.versions)
            .map(([k, v]) => `${k} ${v}`)
            .join("\n"),
        ),
      ),
    ),
  ]);
}

function tiles() {
  const rounds = DATA.rounds.filter((r) => r.traces);
  const [first, last] = [rounds[0], rounds[rounds.length - 1]];
  const tile = (name, value, note) =>
    el(
      "div",
      { class: "tile" },
      el("p", { class: "eyebrow" }, name),
      el("p", { class: "figure" }, value),
      el("p", { class: "fine" }, note),
    );
  const [before, after] = [DATA.evaluations[0], DATA.evaluations[DATA.evaluations.length - 1]];
  const interval = (e) => `${percent(e.value)} [${percent(e.low)}, ${percent(e.high)}]`;
  const total = DATA.ledger.total;
  return el(
    "div",
    { class: "tiles" },
    before && after !== before
      ? tile(
          "Held-out accuracy",
          `${percent(before.accuracy.value)} → ${percent(after.accuracy.value)}`,
          `${before.problems} problems of ${before.source}; policy ${before.policy}: ${interval(before.accuracy)}; policy ${after.policy}: ${interval(after.accuracy)}`,
        )
      : tile(
          "Accuracy of traces",
          `${percent(first.accuracy)} → ${percent(last.accuracy)}`,
          `round ${first.round} and round ${last.round} on ${DATA.run.source}`,
        ),
    before && after !== before
      ? tile(
          "Length",
          `${fixed(before.length.value, 1)} → ${fixed(after.length.value, 1)}`,
          `tokens; [${fixed(before.length.low, 1)}, ${fixed(before.length.high, 1)}] and [${fixed(after.length.low, 1)}, ${fixed(after.length.high, 1)}]`,
        )
      : tile("Length", `${fixed(first.length, 1)} → ${fixed(last.length, 1)}`, "tokens, mean of a round"),
    tile("Traces", count(total.traces), `${count(total.fit)} fit to train on, ${count(total.in_loss)} in the loss`),
    tile(
      "Ledger",
      DATA.ledger.adds_up ? "adds up ✓" : "does not add up ✗",
      `${count(total.tokens_in_loss)} tokens in the loss`,
    ),
  );
}

function ledgerCard() {
  const t = DATA.ledger.total;
  const line = (label, value, kind, note) =>
    el(
      "tr",
      { class: kind },
      el("th", { scope: "row" }, label),
      el("td", { class: "num" }, value),
      el("td", { class: "soft" }, note || ""),
    );
  const minus = (stage, text) =>
    Object.entries(t.rejected[stage] || {}).map(([reason, n]) =>
      line(`${text}: ${reason.replaceAll("_", " ")}`, `− ${count(n)}`, "minus"),
    );
  const body = el(
    "tbody",
    {},
    line("Prompts planned from the source", count(t.planned), "sum"),
    line(
      "Prompts stored",
      count(t.prompts),
      "sum",
      t.num_prompts_rejected
        ? `${count(t.num_prompts_rejected)} of them rejected; their traces are counted below`
        : "",
    ),
    line("Traces", count(t.traces), "sum", `${count(t.prompts)} × ${DATA.ledger.group_size} per prompt`),
    minus("rollout", "no trace"),
    minus("grade", "no grade"),
    minus("score", "no score"),
    line("Fit to train on", count(t.fit), "sum", `${count(t.fit_tokens)} tokens`),
    t.unused
      ? line(
          "groups that their round leaves out: without signal, or more than it asks for",
          `− ${count(t.unused)}`,
          "minus",
          `${count(t.unused_tokens)} tokens`,
        )
      : null,
    t.left_out ? line("left out by the trainer: not finite", `− ${count(t.left_out)}`, "minus") : null,
    line("In the loss", count(t.in_loss), "sum", `${count(t.tokens_in_loss)} tokens`),
    line("of these without advantage (their weight is 0)", count(t.no_advantage), "aside"),
  );
  const mark = (ok) => (ok === true ? "✓ holds" : ok === false ? "✗ does not hold" : "… not known yet");
  const open = t.checks.filter((c) => c.ok === null).length;
  const verdict = DATA.ledger.adds_up
    ? open
      ? "Adds up as far as the run has come."
      : "It adds up: every row is accounted for."
    : "It does not add up.";
  const perRound = DATA.ledger.rounds.map((r) => [
    String(r.round),
    count(r.prompts),
    count(r.traces),
    count(r.num_rejected),
    count(r.fit),
    count(r.left_out),
    r.trained ? count(r.in_loss) : "–",
    r.checks.some((c) => c.ok === false) ? "✗" : r.checks.some((c) => c.ok === null) ? "…" : "✓",
  ]);
  return el(
    "section",
    { class: "card ledger", "aria-labelledby": "ledger-title" },
    el(
      "div",
      { class: "split" },
      el("h2", { id: "ledger-title" }, "From source to loss"),
      el(
        "p",
        { class: `stamp ${DATA.ledger.adds_up ? "good" : "bad"}` },
        `${DATA.ledger.adds_up ? "✓" : "✗"} ${verdict}`,
      ),
    ),
    el(
      "div",
      { class: "two" },
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Ledger" },
        el("table", { class: "account" }, el("caption", { class: "unseen" }, "Ledger of the run"), body),
      ),
      el(
        "ul",
        { class: "checks" },
        t.checks.map((c) =>
          el(
            "li",
            { class: c.ok === false ? "bad" : c.ok ? "good" : "dim" },
            el("span", {}, mark(c.ok)),
            el("span", {}, `${c.what}: ${count(c.left)} ${c.ok === false ? "≠" : "="} ${count(c.right)}`),
          ),
        ),
      ),
    ),
    DATA.notes.map((text) => el("p", { class: "fine" }, foreign(text))),
    tableBelow(
      "Ledger by round",
      ["round", "prompts", "traces", "rejected", "fit", "left out", "in the loss", "adds up"],
      perRound,
      { summary: "By round" },
    ),
  );
}

function rejectedCard() {
  if (!DATA.rejected.length) return null;
  const rows = DATA.rejected.map((r) => [foreign(r.trace), r.reason.replaceAll("_", " "), foreign(r.detail)]);
  return el(
    "details",
    { class: "card below" },
    el("summary", {}, "Rejected rows, a few for each reason"),
    table("Rejected rows", ["trace", "reason", "detail"], rows, { hideCaption: true, words: [1, 2] }),
  );
}

// The view Run: its story, charts by round, and the ledger from source to loss.

// The curves that runs are compared by: title, note, value of a round, options.
const CURVES = [
  ["Accuracy", "share of correct traces among those that no stage rejected", (r) => r.accuracy, { format: percentTick }],
  ["Length", "mean response, tokens", (r) => r.length, {}],
  ["Reward", "mean", (r) => r.reward, {}],
  ["Loss", "mean of the round's steps, nats; no measure of progress", (r) => r.loss, {}],
  ["Gradient norm", "mean of the round's steps, before clipping", (r) => r.grad_norm, { zero: true }],
  ["Student entropy", "mean over the tokens of the writers, nats", (r) => r.student_entropy, { zero: true }],
  ["Teacher entropy", "mean over tokens, nats", (r) => r.entropy, { zero: true }],
  ["Engine against trainer", "mean |log-prob gap| in the trainer's first step, nats", (r) => r.trainer_gap, { zero: true }],
  ["Tokens per second", "response tokens from prompt to score", (r) => r.engine_tokens_per_s, { zero: true }],
];

const NO_PROGRESS = "No measure of progress: each round has other traces, and advantages cancel out";

// Charts that are folded away. What they are about stands in the line that opens them.
// What somebody has opened or closed stays so when a page that follows its run is drawn anew.
const folded = new Map();
const chapter = (title, open, charts) =>
  el(
    "details",
    { class: "chapter", open: folded.get(title) ?? open, ontoggle: (event) => folded.set(title, event.target.open) },
    el("summary", {}, el("h2", {}, title)),
    el("div", { class: "charts" }, charts),
  );

function runView(root) {
  const rounds = DATA.rounds;
  const pick = (i) => go({ view: "traces", round: names[i], verdict: "", q: "", trace: "", token: "" }, { push: true });
  const names = rounds.map((r) => String(r.round));
  const line = (title, note, series, options = {}) =>
    chart({
      title,
      note,
      names,
      xTitle: "round",
      kind: "line",
      pick,
      series: series.map(([name, tone, pick]) => ({ name, tone, values: rounds.map(pick) })),
      ...options,
    });
  const rewardNames = [...new Set(rounds.flatMap((r) => Object.keys(r.rewards)))];
  const stages = [...new Set(rounds.flatMap((r) => Object.keys(r.stages)))];
  const whole = { zero: true, format: (v) => short(v) };
  const stack = (title, note, series, options = {}) => chart({ title, note, names, xTitle: "round", kind: "bars", series, ...options });
  const learned = () => [
    line("Accuracy", "share of correct traces among those that no stage rejected", [["accuracy", "s0", (r) => r.accuracy]], {
      format: percentTick,
    }),
    line("Length", "mean response, tokens", [["length", "s0", (r) => r.length]]),
    line("Reward", "mean", [["reward", "s0", (r) => r.reward]]),
    rewardNames.length ? line("Single rewards", "mean of each reward of the run", rewardNames.map((name, k) => [visible(name), `s${k % 8}`, (r) => r.rewards[name]])) : null,
  ];
  const graded = () => [
    stack(
      "Verdicts",
      "traces",
      Object.keys(VERDICTS)
        .filter((v) => rounds.some((r) => r.verdicts[v]))
        .map((v) => ({ name: `${VERDICTS[v].glyph} ${v}`, tone: `v-${v}`, values: rounds.map((r) => r.verdicts[v]) })),
      { pick, format: count },
    ),
    line("Groups without signal", "groups whose traces all got one reward", [["groups", "s4", (r) => r.groups_without_signal]], whole),
    line("Truncated", "share of traces that reached the limit of tokens", [["truncated", "s1", (r) => r.truncated]], { format: percentTick, low: 0 }),
  ];
  const taught = () => [
    stack(
      "Regimes",
      "share of tokens",
      REGIMES.map((g, k) => ({ name: `${g.letter} ${g.name}`, tone: `g-${g.name}`, values: rounds.map((r) => r.shares?.[k] ?? null) })),
      { pick, format: percentTick, high: 1 },
    ),
    line(
      "Entropy",
      "mean over tokens, nats: of the teacher, and of the student that wrote them",
      [
        ["teacher", "s2", (r) => r.entropy],
        ["student", "s0", (r) => r.student_entropy],
      ],
      { zero: true },
    ),
    line("Teacher against student", "mean |δ| over tokens, nats", [["|δ|", "s3", (r) => r.delta]], { zero: true }),
  ];
  const optimised = () => [
    line("Loss", `mean of the round's steps, nats. ${NO_PROGRESS}`, [["loss", "s0", (r) => r.loss]]),
    line("Gradient norm", "mean of the round's steps, before clipping", [["norm", "s1", (r) => r.grad_norm]], { zero: true }),
    line(
      "Engine against trainer",
      `|log-prob gap| in nats: mean and largest in the trainer's first step, and largest in a sample that engines scored again. The run ends above a mean of ${short(DATA.run.largest_gap)}`,
      [
        ["mean", "s0", (r) => r.trainer_gap],
        ["largest", "s1", (r) => r.trainer_gap_max],
        ["scored again", "s2", (r) => r.rescore_gap],
      ],
      { zero: true },
    ),
  ];
  const worked = () => [
    line(
      "Tokens per second",
      "response tokens: from prompt to score, and in training",
      [
        ["engines", "s0", (r) => r.engine_tokens_per_s],
        ["training", "s1", (r) => r.train_tokens_per_s],
      ],
      whole,
    ),
    line("Staleness", "rounds by which the policy that wrote the traces is behind the round", [["lag", "s4", (r) => r.lag]], whole),
    stack("Seconds by stage", "work of each stage, summed over shards, which may wait for one engine at the same time; and training", [
      ...stages.map((s, k) => ({ name: s, tone: `s${k % 8}`, values: rounds.map((r) => r.stages[s] ?? null) })),
      { name: "training", tone: "s7", values: rounds.map((r) => r.seconds_train) },
    ]),
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
  ];
  fill(root, {}, [
    storyCard(),
    tiles(),
    el("h2", {}, "By round"),
    el("p", { class: "soft off-paper" }, `${isTouched() ? "A tap" : "A click"} on a round's point opens its traces.`),
    el("div", { class: "charts" }, learned()),
    chapter("Verdicts and signal", !isPhone(), graded()),
    chapter("Entropy and regimes", !isPhone(), taught()),
    chapter("Optimiser", !isPhone(), optimised()),
    chapter("Engines and time", false, worked()),
    ledgerCard(),
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

const KINDS = { fact: "·", gain: "▲", loss: "▼", same: "=", odd: "!" };
const KIND_WORDS = { gain: "gain", loss: "loss", odd: "odd" };

// A text in which `commands` stand between backticks.
const withCode = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", {}, foreign(part)) : foreign(part)));

// What happened, in words. Python made the sentences from the figures below.
function storyCard() {
  const sentence = ({ kind, text, view }) =>
    el(
      "li",
      { class: `told-${kind}` },
      el("span", { class: "mark", "aria-hidden": "true" }, KINDS[kind]),
      el("span", {}, kind in KIND_WORDS ? el("span", { class: "unseen" }, `${KIND_WORDS[kind]}: `) : null, withCode(text)),
      view === "run" ? null : el("a", { href: `#${view}` }, "look"),
    );
  const odd = DATA.story.filter(({ kind }) => kind === "odd");
  return el(
    "section",
    { class: "card story", "aria-labelledby": "story-title" },
    el("h2", { id: "story-title" }, "What happened"),
    el("ul", {}, DATA.story.filter(({ kind }) => kind !== "odd").map(sentence)),
    odd.length ? [el("h3", {}, "What is odd"), el("ul", {}, odd.map(sentence))] : el("p", { class: "fine" }, "Nothing odd was found."),
  );
}

function tiles() {
  const known = DATA.rounds.filter((r) => r.traces);
  const whole = known.filter((r) => r.complete !== false); // a round at work has some of its problems
  const rounds = whole.length ? whole : known;
  const [first, last] = [rounds[0], rounds[rounds.length - 1]];
  const stale = !DATA.ledger.total.current;
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
      !DATA.ledger.adds_up ? "does not add up ✗" : stale ? "computed again" : "adds up ✓",
      stale ? "shards are newer than the training that is shown" : `${count(total.tokens_in_loss)} tokens in the loss`,
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
    line("Traces", count(t.traces), "sum", `${count(t.prompts)} × ${DATA.ledger.group_sizes.join(" or ")} per prompt`),
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
    line(`of these without advantage: ${SILENT[DATA.run.advantage]}`, count(t.no_advantage), "aside"),
  );
  const waits = t.current ? "… not known yet" : "… cannot be compared: computed again since it was trained on";
  const mark = (ok) => (ok === true ? "✓ holds" : ok === false ? "✗ does not hold" : waits);
  const open = t.checks.filter((c) => c.ok === null).length;
  const verdict = DATA.ledger.adds_up
    ? open
      ? t.current
        ? "Adds up as far as the run has come."
        : "Adds up as far as it can be compared: some shards are newer than the training."
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
  const rows = DATA.rejected.map((r) => [
    String(r.round),
    String(r.row),
    foreign(r.problem || "–"),
    r.reason.replaceAll("_", " "),
    foreign(r.detail),
    count(r.traces),
    foreign(r.trace),
  ]);
  return el(
    "details",
    { class: "card below" },
    el("summary", {}, "Rejected rows, a few for each reason"),
    el("p", { class: "fine" }, "Rows are those of the source, counted from 0. A row that no prompt could be made from is stored without its problem."),
    table("Rejected rows", ["round", "row", "problem", "reason", "detail", "traces", "first trace"], rows, { hideCaption: true, words: [2, 3, 4, 6] }),
  );
}

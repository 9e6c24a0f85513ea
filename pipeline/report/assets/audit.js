// The gradient audit of the view Evidence: which weighting's gradient points where accuracy rises, by round.

function auditCards(audits) {
  const held = (audits || []).filter((audit) => audit && audit.points.length);
  if (!held.length)
    return [
      missing(
        "Which gradient points where accuracy rises?",
        "No audit of this run is stored. It reads stored traces and needs no engine:",
        "egrsd audit --run RUN --round 0",
      ),
    ];
  return held.map(auditCard);
}

function auditCard(audit) {
  const interval = (e, f) => (e && known(e.value) ? `${f(e.value)} [${f(e.low)}, ${f(e.high)}]` : "–");
  const three = (v) => fixed(v, 3);
  const rows = audit.points.map((p) => [
    foreign(p.name),
    interval(p.cosine, three),
    interval(p.batch_cosine, three),
    interval(p.averaged_cosine, three),
    interval(p.batch_share, three),
    interval(p.difference.batch_cosine, (v) => signed(v, 3)),
    interval(p.push, three),
    interval(p.longer, (v) => signed(v, 3)),
    interval(p.adamw, three),
  ]);
  const shares = (kind, names) =>
    names.map((name, place) => [
      foreign(name),
      percent((audit.classes[kind].tokens || [])[place]),
      ...audit.points.map((p) => interval((audit.classes[kind][p.name] || [])[place], percent)),
    ]);
  const below = (kind, text, names) =>
    tableBelow(`Share of the push towards accuracy by ${text}`, [kind, "tokens", ...audit.points.map((p) => foreign(p.name))], shares(kind, names), {
      summary: `Where the push comes from, by ${text}`,
    });
  return el(
    "section",
    { class: "card" },
    el("h2", {}, `Which gradient points where accuracy rises? Round ${audit.round}`),
    el(
      "p",
      { class: "soft" },
      `From ${count(audit.traces)} stored traces of ${count(audit.problems)} problems, written by policy ${audit.policy}. Cosine is that of the expected gradient with the gradient of accuracy. Batch cosine is that of the gradient of one minibatch. Averaged cosine is that of AdamW's first moment, which averages many. Signal is the share of the expected gradient in its squared norm. Push is the part along the gradient of accuracy, as a multiple of the reference's. Longer answers is the cosine with the gradient of the mean length. AdamW's step is the cosine of the step that AdamW makes of these blocks, with its noise. Intervals are 95 % over ${audit.blocks} blocks of problems. These figures describe one policy. On nine generated worlds each of the three cosines ranked what training gained (rank correlation .39 to .48). Of large models that is not known.`,
    ),
    table(
      "Weightings",
      ["weighting", "cosine", "batch cosine", "averaged cosine", "signal", "batch cosine against the first", "push", "longer answers", "AdamW's step"],
      rows,
    ),
    below("regime", "regime", audit.classes.regimes),
    (audit.classes.decile.tokens || []).length
      ? below("decile", "tenth of the teacher's entropy", audit.classes.decile.tokens.map((_, place) => String(place + 1)))
      : "",
    ...(audit.classes.each.regime ? [aloneOf(audit.classes, interval, three)] : []),
    ...(audit.classes.labels ? truthOf(audit.classes.labels) : []),
  );
}

// The reference's gradient on the tokens of one class alone: which tokens' gradients point up?
function aloneOf(classes, interval, three) {
  const named = [
    ...classes.each.regime.map((point, place) => [classes.regimes[place], point]),
    ...classes.each.decile.map((point, place) => [`tenth ${place + 1}`, point]),
  ];
  const rows = named.map(([name, p]) => [foreign(name), ...[p.cosine, p.batch_cosine, p.batch_share, p.push].map((e) => interval(e, three))]);
  return tableBelow("The reference on the tokens of one class alone", ["tokens", "cosine", "batch cosine", "signal", "push"], rows, {
    summary: "Which tokens' gradients point where accuracy rises",
  });
}

// What a tiny world knows of its tokens: the signals of each true class, and how well the regimes find the classes.
function truthOf(labels) {
  const figures = ["entropy", "lookahead", "log_ratio", "delta"];
  const by = Object.entries(labels.by_class).map(([name, row]) => [
    foreign(name),
    count(row.tokens),
    ...figures.map((figure) => (known(row[figure]) ? signed(row[figure], 3) : "–")),
  ]);
  const found = Object.entries(labels.regimes).map(([name, row]) => [
    foreign(name),
    foreign(row.class),
    ...["precision", "recall"].map((score) => (known(row[score]) ? percent(row[score]) : "–")),
  ]);
  return [
    tableBelow("Means by true class, nats", ["class", "tokens", "entropy", "lookahead", "log-ratio", "|log-ratio|"], by, {
      summary: "What each true class of tokens has",
    }),
    tableBelow("Regimes as signs of a true class", ["regime", "class", "precision", "recall"], found, {
      summary: "How well the regimes find the classes",
    }),
  ];
}

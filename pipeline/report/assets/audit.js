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
    interval(p.batch_share, three),
    interval(p.difference.batch_cosine, (v) => signed(v, 3)),
  ]);
  const classes = audit.classes.regimes.map((name, place) => [
    foreign(name),
    percent(audit.classes.regime.tokens[place]),
    ...audit.points.map((p) => interval((audit.classes.regime[p.name] || [])[place], percent)),
  ]);
  return el(
    "section",
    { class: "card" },
    el("h2", {}, `Which gradient points where accuracy rises? Round ${audit.round}`),
    el(
      "p",
      { class: "soft" },
      `From ${count(audit.traces)} stored traces of ${count(audit.problems)} problems, written by policy ${audit.policy}. Cosine is that of the expected gradient with the gradient of accuracy. Batch cosine is that of the gradient of one minibatch. Signal is the share of the expected gradient in its squared norm. Intervals are 95 % over ${audit.blocks} blocks of problems. These figures describe one policy; no training run has shown yet that they predict what helps.`,
    ),
    table("Weightings", ["weighting", "cosine", "batch cosine", "signal", "batch cosine against the first"], rows),
    tableBelow(
      "Share of the push towards accuracy by regime",
      ["regime", "tokens", ...audit.points.map((p) => foreign(p.name))],
      classes,
      { summary: "Where the push comes from" },
    ),
  );
}

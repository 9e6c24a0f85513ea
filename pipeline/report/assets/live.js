// A page that `egrsd report --serve` serves asks its server for what is new, and follows the run in place.

const ASK_MS = 2000;

async function follow(version) {
  let now = version;
  let lost = false;
  for (;;) {
    await new Promise((done) => setTimeout(done, ASK_MS));
    try {
      const state = await (await fetch("state")).json();
      lost = false;
      tellLive(state.said);
      if (state.version === now) continue;
      const found = await (await fetch("document")).json();
      now = found.version;
      SERVED = found.blocks;
      DOC = found.document;
      renew();
    } catch {
      if (!lost) tellLive("The server does not answer any more. This page keeps what it has.");
      lost = true;
    }
  }
}

// Show the new document where the reader is: the same view, filters, trace, token and scroll.
function renew() {
  const [x, y] = [scrollX, scrollY];
  const search = document.activeElement?.type === "search";
  opened.clear();
  if (DOC.runs.length) prepare();
  reader.trace = null;
  start();
  scrollTo(x, y);
  if (search) document.querySelector(`#view-${at.view} input[type=search]`)?.focus();
}

function tellLive(text) {
  document.getElementById("live").replaceChildren(visible(text));
}

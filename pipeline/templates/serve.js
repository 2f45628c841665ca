// Simultaneous requests: one is captioned while the next one uploads.
const AT_ONCE = 2;
const MAX_FILE_BYTES = Number(document.body.dataset.maxFileBytes);
const BEAM_SIZE = Number(document.body.dataset.beamSize);
const IMAGE = /\.(jpe?g|jpe|jfif|jp2|png|webp|avif|gif|tiff?|bmp|tga|p[pgb]m|hei[cf])$/i;

const find = (id) => document.getElementById(id);
const controls = find("controls");
const cards = [];
let running = 0;

// --- Adding images: chosen, dropped or pasted ------------------------------------------------

function add(files) {
  for (const file of files) {
    const element = find("card").content.firstElementChild.cloneNode(true);
    const part = (selector) => element.querySelector(selector);
    const card = {
      file, element, address: URL.createObjectURL(file), state: "waiting", captions: [], error: "",
      note: part(".note"), list: part(".captions"), retry: part(".retry"), cancel: null,
      time: part(".time"),
    };
    const image = part("img");
    image.alt = `Image ${file.name}`;
    image.addEventListener("error", () => part(".enlarge").replaceWith("No preview"));
    image.src = card.address;
    part(".enlarge").setAttribute("aria-label", `Enlarge ${file.name}`);
    part(".enlarge").addEventListener("click", () => {
      find("large").src = card.address;
      find("large").alt = image.alt;
      find("viewer").showModal();
    });
    part("h2").textContent = file.name;
    part("h2").title = file.name;
    part(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    part(".remove").addEventListener("click", () => remove(card));
    card.retry.addEventListener("click", () => { enqueue(card); pump(); });
    cards.push(card);
    find("cards").append(element);
    enqueue(card);
  }
  pump();
  cards.at(-files.length)?.element.scrollIntoView({ block: "nearest" });
}

function remove(card) {
  forget(card);
  const place = cards.indexOf(card);
  cards.splice(place, 1);
  // Without this the focus would go back to the top of the page.
  (cards[place] ?? cards[place - 1])?.element.querySelector(".remove").focus();
  if (!cards.length) find("files").focus();
  pump();
}

function forget(card) {
  card.cancel?.abort();
  card.cancel = null;
  URL.revokeObjectURL(card.address);
  card.element.remove();
}

// The dropped files, with the contents of dropped folders in the order of their names.
async function filesOf(transfer) {
  const entries = Array.from(transfer.items, (item) => item.webkitGetAsEntry?.());
  if (!entries.some((entry) => entry?.isDirectory)) return Array.from(transfer.files);
  const files = [];
  const walk = async (entry, asked) => {
    if (entry.isFile) {
      // Folders also hold files that nobody wants captioned.
      if (!asked && (entry.name.startsWith(".") || !IMAGE.test(entry.name))) return;
      files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    const inside = [];
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) break;
      inside.push(...some);
    }
    inside.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
    for (const member of inside) if (!member.name.startsWith(".")) await walk(member, false);
  };
  for (const entry of entries) if (entry) await walk(entry, true);
  return files;
}

find("files").addEventListener("change", (event) => {
  add(Array.from(event.target.files));
  event.target.value = ""; // so that the same image can be chosen again
});

find("examples").addEventListener("click", async ({ target }) => {
  const name = target.closest("button")?.dataset.name;
  if (!name) return;
  const response = await fetch(`examples/${name}`);
  add([new File([await response.blob()], name, { type: "image/jpeg" })]);
});

let depth = 0; // dragging over a child leaves its parent
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const veil = (shown) => { find("veil").hidden = !shown; };
addEventListener("dragenter", (event) => { if (carriesFiles(event)) { depth += 1; veil(true); } });
addEventListener("dragleave", (event) => { if (carriesFiles(event)) { depth = Math.max(0, depth - 1); veil(depth > 0); } });
addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
addEventListener("drop", async (event) => {
  depth = 0;
  veil(false);
  if (!carriesFiles(event)) return;
  event.preventDefault();
  try {
    const files = await filesOf(event.dataTransfer);
    if (files.length) add(files);
    else say("No images were dropped");
  } catch {
    say("The dropped files cannot be read");
  }
});
addEventListener("paste", (event) => {
  const files = Array.from(event.clipboardData?.files ?? []);
  if (!files.length) return; // text, into a field
  event.preventDefault();
  add(files);
});

// --- Requesting captions: one image per request --------------------------------------------------

function enqueue(card) {
  card.cancel?.abort();
  card.cancel = null;
  card.error = "";
  card.state = "waiting";
  if (card.file.size > MAX_FILE_BYTES) {
    card.state = "failed";
    card.final = true; // no setting changes this
    card.error = `File exceeds the ${MAX_FILE_BYTES / 1e6} MB limit`;
  }
  show(card);
}

function pump() {
  while (running < AT_ONCE) {
    const next = cards.find((card) => card.state === "waiting");
    if (!next) break;
    run(next);
  }
  report();
}

async function run(card) {
  const cancel = new AbortController();
  card.cancel = cancel;
  card.state = "running";
  running += 1;
  show(card);
  try {
    const [answer, seconds] = await ask(card.file, cancel.signal);
    if (card.cancel !== cancel) return; // the settings have changed since
    card.captions = answer.captions ?? [];
    card.error = answer.error ? answer.error[0].toUpperCase() + answer.error.slice(1) : "";
    card.seconds = answer.error ? null : seconds;
    card.state = answer.error ? "failed" : "done";
    card.final = Boolean(answer.error);
  } catch (error) {
    if (card.cancel !== cancel) return;
    card.state = "failed";
    card.error = error instanceof TypeError
      ? "No answer. The captioner may have been stopped, or the image moved."
      : `${error.message}.`;
  } finally {
    running -= 1;
    show(card);
    pump();
  }
}

async function ask(file, signal) {
  const body = new FormData();
  for (const [name, value] of new FormData(controls)) if (value !== "") body.append(name, value);
  body.append("image", file, file.name);
  for (;;) {
    const response = await fetch("caption", { method: "POST", body, signal });
    if (response.status === 503) { // busy with other requests
      const seconds = Number(response.headers.get("Retry-After")) || 2;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      signal.throwIfAborted();
      continue;
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return [answer.images[0], answer.seconds];
  }
}

// --- Drawing cards ----------------------------------------------------------------------------------

function show(card) {
  const { element, state } = card;
  const busy = state === "waiting" || state === "running";
  element.classList.toggle("failed", state === "failed");
  element.classList.toggle("unreadable", card.final === true);
  element.classList.toggle("stale", busy);
  element.setAttribute("aria-busy", busy);
  card.retry.hidden = state !== "failed" || card.final === true;
  card.note.textContent = state === "failed" ? card.error
    : card.list.childElementCount ? "" : state === "running" ? "Captioning…" : state === "waiting" ? "Waiting" : "";
  const [best] = state === "done" ? card.captions : [];
  element.querySelector(".sure").replaceChildren(
    ...(best ? [confidence(Math.exp(best.log_probability / (best.words.length + 1)))] : []),
  );
  card.time.textContent = state === "done" ? `${card.seconds.toFixed(2)} s` : "";
  if (!busy) card.list.replaceChildren(...(state === "done" ? card.captions.map(captionElement) : []));
  if (!busy) explain(element, best?.words.map(({ cells }) => cells));
}

// The parts of the image that speak for a word of the first caption: by pointer, or by arrow keys.
function explain(element, cells) {
  const canvas = element.querySelector(".explanation");
  const sentence = element.querySelector(".sentence");
  if (canvas) canvas.hidden = true; // without a preview there is none
  if (!canvas || !cells?.[0]) return;
  const words = [...sentence.querySelectorAll(".word")];
  let shown = -1;
  const show = (place) => {
    shown = place;
    canvas.hidden = shown < 0;
    words.forEach((word, other) => word.classList.toggle("looked-at", other === shown));
    if (shown < 0) return;
    const most = Math.max(1e-9, ...cells[shown]);
    const shares = cells[shown].map((cell) => 100 * Math.max(0, cell) / most);
    drawCells(canvas, shares, canvas.clientWidth, canvas.clientHeight);
  };
  sentence.tabIndex = 0;
  sentence.addEventListener("mouseover", ({ target }) => show(words.indexOf(target)));
  sentence.addEventListener("mouseleave", () => show(-1));
  sentence.addEventListener("blur", () => show(-1));
  sentence.addEventListener("keydown", ({ key }) => {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (turn) show(shown < 0 && turn < 0 ? words.length - 1 : (shown + turn + words.length) % words.length);
  });
}

function captionElement({ caption, log_probability: logProbability, words, score_parts: parts }) {
  const element = find("caption").content.firstElementChild.cloneNode(true);
  const part = (selector) => element.querySelector(selector);
  part(".whole").textContent = caption;
  part(".words").append(...captionNodes(caption, words.map((word) => [word.text, word.probability])));
  part("ul").append(...words.map(({ text, probability }) => {
    const item = document.createElement("li");
    item.textContent = `${text}: ${percent(probability)}`;
    return item;
  }));
  part(".value").textContent = signed(scoreOf(parts));
  part(".score").title = explainScore(parts, logProbability);
  part(".copy").setAttribute("aria-label", `Copy: ${caption}`);
  part(".copy").addEventListener("click", () => copy(caption, "Caption copied"));
  return element;
}

function report() {
  const count = (state) => cards.filter((card) => card.state === state).length;
  const failed = count("failed");
  const left = count("waiting") + count("running");
  const images = cards.length === 1 ? "image" : "images";
  document.body.classList.toggle("filled", cards.length > 0);
  find("legend").hidden = find("actions").hidden = !cards.length;
  if (left) say(`${cards.length - left} of ${cards.length} ${images} captioned`);
  else if (failed) say(`${cards.length - failed} of ${cards.length} ${images} captioned, ${failed} failed`);
  else say(cards.length ? `${cards.length} ${images}` : "");
}

// Without cards the bar is there for a message only, without its buttons.
function say(text) {
  find("bar").hidden = !text;
  find("status").textContent = text;
}

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
  } catch {
    say("The browser did not allow copying");
  }
}

// --- Controls --------------------------------------------------------------------------------------

function recaption() {
  const wrong = Array.from(controls.elements).find((field) => field.willValidate && !field.validity.valid);
  find("complaint").textContent = wrong
    ? `${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}` : "";
  if (wrong) return;
  for (const card of cards) if (!card.final) enqueue(card);
  pump();
}

let pause;
controls.addEventListener("input", ({ target }) => {
  const { beam_size: beam, num_captions: number } = controls.elements;
  // There are at most as many captions as beams: the other field follows the one that is changed.
  if (beam.value !== "" && Number(number.value) > Number(beam.value) && beam.value > 0) {
    if (target === beam) number.value = beam.value;
    else beam.value = number.value;
  }
  beam.placeholder = `auto (${Math.max(BEAM_SIZE, Number(number.value))})`;
  for (const { element } of cards) element.classList.add("stale"); // made with other settings
  clearTimeout(pause);
  pause = setTimeout(recaption, 300);
});
controls.addEventListener("submit", (event) => event.preventDefault());
find("sampling").addEventListener("change", (event) => {
  const on = event.target.checked;
  find("draws").hidden = find("draws").disabled = !on;
  controls.elements.beam_size.disabled = on;
  document.body.classList.toggle("sampling", on);
});
find("again").addEventListener("click", () => {
  const seed = controls.elements.seed;
  seed.value = (Number(seed.value) + 1) % (Number(seed.max) + 1);
  recaption();
});
find("numbers").addEventListener("change", (event) => {
  document.body.classList.toggle("numbers", event.target.checked);
});
// A spreadsheet would evaluate text that begins like a formula.
const safe = (text) => text.replace(/[\t\r\n]+/g, " ").replace(/^(?='*[=+\-@])/, "'");
const COLUMNS = ["image", "rank", "caption", "log_probability"];
const rows = () => cards.filter(({ state }) => state === "done").flatMap(({ file, captions }) =>
  captions.map((each, place) => [safe(file.name), place + 1, safe(each.caption), each.log_probability]));

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

find("copy-all").addEventListener("click", () => {
  const all = rows();
  const lines = [COLUMNS, ...all].map((cells) => `${cells.join("\t")}\n`);
  copy(lines.join(""), `${all.length} ${all.length === 1 ? "caption" : "captions"} copied`);
});
find("csv").addEventListener("click", () => {
  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const lines = [COLUMNS, ...rows()].map((cells) => `${cells.map(cell).join(",")}\n`);
  download("captions.csv", "text/csv", lines.join(""));
});
find("json").addEventListener("click", () => {
  const records = cards.filter(({ state }) => state === "done")
    .map(({ file, captions }) => ({ image: file.name, captions }));
  download("captions.json", "application/json", `${JSON.stringify(records, null, 2)}\n`);
});
find("viewer").addEventListener("click", () => find("viewer").close());
find("clear").addEventListener("click", () => {
  cards.splice(0).forEach(forget);
  report();
  find("files").focus();
});

// Builds the page from its records. Text is only ever set as textContent, never as markup.
(() => {
  const FIRST = 24; // cards drawn first, so that typing stays quick; more follow on scrolling
  const CHUNK = 60; // cards drawn at a time from then on
  const byId = (id) => document.getElementById(id);
  const collator = new Intl.Collator(undefined, { numeric: true });

  const all = [];
  const failures = [];
  for (const element of byId("records").children) {
    const record = JSON.parse(element.textContent);
    (record.error === null ? all : failures).push(record);
  }
  byId("records").remove(); // otherwise the text stays in memory beside the parsed records

  // The search ignores case and accents.
  const fold = (text) => text.normalize("NFKD").replace(/\p{M}+/gu, "").toLowerCase();
  for (const record of all) {
    const texts = record.captions.map((caption) => caption.text);
    record.searched = fold([...texts, record.name, ...record.references].join("\n"));
    record.confidence = record.captions.length ? record.captions[0].confidence : null;
  }
  [...all]
    .sort((a, b) => collator.compare(a.name, b.name))
    .forEach((record, rank) => { record.rank = rank; });

  const count = (number, noun) =>
    `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const bestText = (record) => (record.captions.length ? record.captions[0].text : "");

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Orders

  const by = (key, direction) => (a, b) => {
    if (a[key] === null || b[key] === null) {
      return (a[key] === null) - (b[key] === null) || a.rank - b.rank;
    }
    return direction * (a[key] - b[key]) || a.rank - b.rank;
  };
  const scored = all.some((record) => record.score !== null);
  const orders = new Map([
    ...(scored
      ? [
          ["score-up", ["CIDEr-D, worst first", by("score", 1)]],
          ["score-down", ["CIDEr-D, best first", by("score", -1)]],
        ]
      : []),
    ["name", ["Name", (a, b) => a.rank - b.rank]],
    ["sure-up", ["Least certain first", by("confidence", 1)]],
    ["sure-down", ["Most certain first", by("confidence", -1)]],
  ]);
  for (const [value, [label]] of orders) {
    const option = make("option", "", label);
    option.value = value;
    byId("order").append(option);
  }

  // The list

  const grid = byId("grid");
  let ordered = all;
  let shown = [];
  let drawn = 0;

  // A long name is cut in the middle: its beginning shrinks, its end stays.
  function showName(element, name) {
    const letters = [...name];
    const end = letters.length > 24 ? letters.slice(-16).join("") : "";
    element.title = name;
    element.replaceChildren(
      make("bdi", "head", letters.slice(0, end ? -16 : letters.length).join("")),
      ...(end ? [make("bdi", "", end)] : []),
    );
  }

  function figures(record, parent) {
    if (record.score !== null) {
      parent.append(make("span", "", `CIDEr-D ${record.score.toFixed(1)}`));
    }
    if (record.confidence !== null) parent.append(confidence(record.confidence));
  }

  function thumbnail(record) {
    if (record.thumbnail === null) {
      const frame = make("span", "frame");
      frame.setAttribute("role", "img");
      frame.setAttribute("aria-label", `${bestText(record)} (no image: ${record.missing})`);
      frame.append(make("span", "", "No image"), make("bdi", "", record.missing));
      return frame;
    }
    const image = make("img");
    image.alt = bestText(record) || "An image without a caption";
    image.width = record.width;
    image.height = record.height;
    image.decoding = "async";
    image.loading = "lazy";
    image.src = record.thumbnail;
    return image;
  }

  function card(record, position) {
    record.card ??= newCard(record);
    record.card.dataset.position = position;
    record.card.setAttribute("aria-setsize", shown.length);
    record.card.setAttribute("aria-posinset", position + 1);
    return record.card;
  }

  function newCard(record) {
    const item = byId("card").content.firstElementChild.cloneNode(true);
    item.querySelector(".open").append(thumbnail(record));
    item.querySelector(".caption").textContent = bestText(record);
    showName(item.querySelector(".name"), record.name);
    figures(record, item.querySelector(".figure"));
    item.querySelector(".copy").hidden = !bestText(record);
    return item;
  }

  function draw(until) {
    const cards = document.createDocumentFragment();
    const end = Math.min(shown.length, until);
    for (; drawn < end; drawn++) cards.append(card(shown[drawn], drawn));
    grid.append(cards);
    byId("more").hidden = drawn === shown.length;
  }

  function refresh() {
    const words = fold(byId("search").value).split(/\s+/).filter(Boolean);
    shown = ordered.filter((record) =>
      words.every((word) => record.searched.includes(word)) && inRange(record));
    grid.replaceChildren();
    drawn = 0;
    draw(FIRST);
    byId("nothing").hidden = shown.length > 0 || (words.length === 0 && range === null);
    showCount();
    remember();
  }

  function sort() {
    ordered = [...all].sort(orders.get(byId("order").value)[1]);
    refresh();
  }

  function showCount() {
    const total = count(all.length, "image");
    byId("count").textContent =
      shown.length < all.length ? `${shown.length.toLocaleString("en")} of ${total}` : total;
  }

  // The histogram of scores: bars that choose a range of them

  const BARS = 20;
  const highest = Math.max(1e-9, ...all.map((record) => record.score ?? 0));
  const barOf = (score) => Math.min(BARS - 1, Math.floor(BARS * Math.max(0, score) / highest));
  let range = null; // the first and the last bar chosen
  const inRange = ({ score }) =>
    range === null || (score !== null && barOf(score) >= range[0] && barOf(score) <= range[1]);

  function showRange() {
    [...byId("histogram").children].forEach((bar, place) => {
      bar.setAttribute("aria-pressed", range !== null && place >= range[0] && place <= range[1]);
    });
  }

  function drawHistogram() {
    const counts = Array(BARS).fill(0);
    for (const { score } of all) if (score !== null) counts[barOf(score)] += 1;
    counts.forEach((number, place) => {
      const bar = make("button");
      const from = (limit) => (limit * highest / BARS).toFixed(0);
      bar.type = "button";
      bar.title = `CIDEr-D ${from(place)} to ${from(place + 1)}: ${count(number, "image")}`;
      bar.setAttribute("aria-label", bar.title);
      const filled = make("span");
      filled.style.height = `${100 * number / Math.max(...counts)}%`;
      bar.append(filled);
      bar.addEventListener("click", () => {
        if (range === null) range = [place, place];
        else if (place >= range[0] && place <= range[1]) range = null;
        else range = [Math.min(range[0], place), Math.max(range[1], place)];
        showRange();
        refresh();
      });
      byId("histogram").append(bar);
    });
    showRange();
    byId("highest").textContent = highest.toFixed(0);
    byId("spread").hidden = false;
  }

  // Search, order and open image are kept in the address, so that a reload or a link restores them.

  function remember() {
    const state = new URLSearchParams();
    if (byId("search").value) state.set("search", byId("search").value);
    if (byId("order").selectedIndex) state.set("sort", byId("order").value);
    if (byId("viewer").open) state.set("image", shown[current].name);
    history.replaceState(null, "", `#${state}`);
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1));
    byId("search").value = state.get("search") ?? "";
    if (orders.has(state.get("sort"))) byId("order").value = state.get("sort");
    sort();
    const position = shown.findIndex((record) => record.name === state.get("image"));
    if (position >= 0) open(position);
  }

  byId("search").addEventListener("input", refresh);
  byId("order").addEventListener("change", () => {
    sort();
    scrollTo(0, Math.min(scrollY, byId("images").offsetTop));
  });
  byId("clear").addEventListener("click", () => {
    byId("search").value = "";
    range = null;
    showRange();
    byId("search").focus();
    refresh();
  });
  byId("more").addEventListener("click", () => {
    const first = drawn;
    draw(drawn + CHUNK);
    grid.children[first].querySelector(".open").focus();
  });
  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.at(-1).isIntersecting) return;
      draw(drawn + CHUNK);
      // It reports changes only: on a tall screen the end may still be visible.
      observer.unobserve(byId("more"));
      observer.observe(byId("more"));
    },
    { rootMargin: "1500px" },
  );
  observer.observe(byId("more"));
  addEventListener("beforeprint", () => draw(shown.length));

  // Copying

  async function copy(button, text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without the clipboard interface or its permission: the old way.
      const field = make("textarea", "unseen");
      field.value = text;
      button.after(field);
      field.select();
      document.execCommand("copy");
      field.remove();
      button.focus();
    }
    const label = button.querySelector(".unseen");
    label.textContent = "Copied";
    button.classList.add("done");
    (viewer.open ? byId("announcement") : byId("count")).textContent = "Copied";
    setTimeout(() => {
      label.textContent = "Copy the caption";
      button.classList.remove("done");
      showCount();
    }, 1500);
  }

  // The large view of one image

  const viewer = byId("viewer");
  let current = 0;

  function spoken(caption, best) {
    const item = byId("spoken").content.firstElementChild.cloneNode(true);
    const line = item.querySelector(".caption");
    item.classList.toggle("best", best);
    line.append(...captionNodes(caption.text, caption.words));
    if (caption.words.length) {
      item.querySelector(".probabilities").textContent = `Word by word: ${caption.words
        .map(([text, probability]) => `${text} ${probability === null ? "" : percent(probability)}`)
        .join(", ")}`;
    }
    const figure = item.querySelector(".figure");
    if (caption.confidence !== null) figure.append(confidence(caption.confidence));
    if (caption.logProbability !== null) {
      const scored = Object.keys(caption.parts).length > 0;
      const part = make("span", "explained", scored
        ? `score ${signed(scoreOf(caption.parts))}`
        : `log-probability ${signed(caption.logProbability)}`);
      if (scored) part.title = explainScore(caption.parts, caption.logProbability);
      figure.append(part);
    }
    item.querySelector(".copy").addEventListener("click", (event) => {
      copy(event.currentTarget, caption.text);
    });
    return item;
  }

  function showLarge(record) {
    const shownImage = thumbnail(record);
    shownImage.loading = "eager";
    byId("stage").replaceChildren(shownImage, explained);
    const limit = (width, height) => { // enlarged at most twice
      for (const { style } of [shownImage, explained]) {
        style.maxWidth = `${2 * width}px`;
        style.maxHeight = `${2 * height}px`;
      }
    };
    if (record.original === null) {
      if (record.thumbnail !== null) limit(record.width, record.height);
      return;
    }
    // The thumbnail stays until the image has loaded, and forever if it is missing.
    const large = new Image();
    large.src = record.original;
    large.decode().then(
      () => {
        if (!shownImage.isConnected) return;
        shownImage.width = large.naturalWidth;
        shownImage.height = large.naturalHeight;
        limit(large.naturalWidth, large.naturalHeight);
        shownImage.src = record.original;
      },
      () => {},
    );
  }

  // The parts of the image that speak for a word of its best caption.

  const explained = make("canvas", "explanation");
  let word = -1;
  const isExplained = ({ captions: [best] }) => best?.words.some(([, , cells]) => cells?.length);

  function explain(place) {
    const record = shown[current];
    const elements = byId("viewer-best").querySelectorAll(".word");
    const [, , cells = []] = record.captions[0]?.words[place] ?? [];
    elements.forEach((element, other) => element.classList.toggle("looked-at", other === place));
    word = cells.length ? place : -1;
    explained.hidden = word < 0;
    if (word >= 0) drawCells(explained, cells, record.width, record.height);
  }

  byId("viewer-best").addEventListener("mouseover", ({ target }) => {
    explain([...byId("viewer-best").querySelectorAll(".word")].indexOf(target));
  });
  byId("viewer-best").addEventListener("mouseleave", () => explain(-1));

  function show(position) {
    const record = shown[position];
    current = position;
    showLarge(record);
    showName(byId("viewer-name"), record.name);
    byId("viewer-place").textContent =
      `${(position + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    const [best, ...others] = record.captions.map((caption, rank) => spoken(caption, rank === 0));
    byId("viewer-best").replaceChildren(...(best ? [best] : []));
    byId("viewer-others").replaceChildren(...others);
    explain(-1);
    byId("explained-legend").hidden = !isExplained(record);
    byId("legend").hidden = !record.captions.some((caption) => caption.words.length);
    const references = byId("viewer-references");
    references.hidden = record.references.length === 0 && record.score === null;
    references.querySelector("ul").replaceChildren(
      ...record.references.map((reference) => {
        const item = make("li", "", reference);
        item.dir = "auto";
        return item;
      }),
    );
    byId("viewer-score").textContent =
      record.score === null ? "" : `CIDEr-D ${record.score.toFixed(1)}`;
    byId("previous").setAttribute("aria-disabled", position === 0);
    byId("next").setAttribute("aria-disabled", position === shown.length - 1);
    byId("sheet").scrollTop = 0;
    remember();
  }

  function open(position) {
    byId("announcement").textContent = "";
    viewer.showModal();
    show(position);
  }

  function step(distance) {
    const position = current + distance;
    if (position < 0 || position >= shown.length || !distance) return;
    show(position);
    byId("announcement").textContent =
      `${byId("viewer-place").textContent}: ${bestText(shown[position]) || shown[position].name}`;
  }

  grid.addEventListener("click", (event) => {
    const item = event.target.closest(".card");
    if (!item) return;
    const position = Number(item.dataset.position);
    const copier = event.target.closest(".copy");
    if (copier) {
      copy(copier, bestText(shown[position]));
    } else if (event.target.closest(".open")) {
      open(position);
    }
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  // On the page as a whole: the focus is lost when the button that has it is replaced.
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (viewer.open) {
      const words = shown[current].captions[0]?.words.length ?? 0;
      const turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (turn && !byId("explained-legend").hidden) {
        event.preventDefault();
        explain(word < 0 && turn < 0 ? words - 1 : (word + turn + words) % words);
        return;
      }
      const distance = {
        ArrowLeft: -1, ArrowRight: 1, Home: -current, End: shown.length - 1 - current,
      }[event.key];
      if (distance === undefined) return;
      event.preventDefault();
      step(distance);
    } else if (event.key === "/" && !event.target.matches("input, select")) {
      event.preventDefault();
      byId("search").focus();
    }
  });
  // Focus returns to the card of the image shown last.
  viewer.addEventListener("close", () => {
    remember();
    draw(current + 1);
    byId("stage").replaceChildren();
    grid.children[current].querySelector(".open").focus();
  });

  // Light and dark

  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showTheme = () => byId("theme").setAttribute("aria-pressed", isDark());
  // Browsers may refuse storage to a page that is a file.
  const stored = (use) => { try { return use(localStorage); } catch { return null; } };
  const theme = stored((storage) => storage.getItem("theme"));
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored((storage) => storage.setItem("theme", root.dataset.theme));
    showTheme();
  });
  system.addEventListener("change", showTheme);
  showTheme();

  if (failures.length) {
    const part = byId("failures");
    part.hidden = false;
    part.querySelector("summary").textContent =
      `${count(failures.length, "image")} could not be captioned`;
    part.querySelector("ul").append(
      ...failures.map((record) => {
        const item = make("li");
        const reason = make("span", "reason", record.error);
        reason.dir = "auto";
        item.append(make("bdi", "", record.name), ": ", reason);
        return item;
      }),
    );
  }
  byId("explained-hint").hidden = !all.some(isExplained);
  byId("total").textContent = count(all.length, "image");
  if (scored) drawHistogram();
  restore();
})();

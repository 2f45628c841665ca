"use strict";

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

  const percent = (share) => {
    const value = 100 * share;
    return `${value < 1 ? "< 1" : Math.round(value)} %`;
  };
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

  function figures(record, parent) {
    if (record.score !== null) {
      parent.append(make("span", "", `CIDEr-D ${record.score.toFixed(1)}`));
    }
    if (record.confidence !== null) {
      const part = make("span", "", `${percent(record.confidence)} per word`);
      part.title = "The mean probability of the caption’s words (geometric)";
      parent.append(part);
    }
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
    item.querySelector(".name bdi").textContent = record.name;
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
    shown = ordered.filter((record) => words.every((word) => record.searched.includes(word)));
    grid.replaceChildren();
    drawn = 0;
    draw(FIRST);
    byId("nothing").hidden = shown.length > 0 || words.length === 0;
    showCount();
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

  byId("search").addEventListener("input", refresh);
  byId("order").addEventListener("change", () => {
    sort();
    scrollTo(0, Math.min(scrollY, byId("images").offsetTop));
  });
  byId("clear").addEventListener("click", () => {
    byId("search").value = "";
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
    if (caption.words.length) {
      let written = 0; // position in the text, which joins some tokens, such as "man" and "'s"
      for (const [text, probability] of caption.words) {
        const start = caption.text.indexOf(text, written);
        if (start < 0) continue;
        const word = make("span", "word", text);
        if (probability !== null) {
          word.style.setProperty("--doubtful", (1 - probability).toFixed(3));
          word.title = percent(probability);
          word.dataset.probability = Math.round(100 * probability);
        }
        line.append(caption.text.slice(written, start), word);
        written = start + text.length;
      }
      line.append(caption.text.slice(written));
      item.querySelector(".probabilities").textContent = `Word by word: ${caption.words
        .map(([text, probability]) => `${text} ${probability === null ? "" : percent(probability)}`)
        .join(", ")}`;
    } else {
      line.textContent = caption.text;
    }
    const figure = item.querySelector(".figure");
    if (caption.confidence !== null) {
      figure.append(make("span", "", `${percent(caption.confidence)} per word`));
    }
    if (caption.logProbability !== null) {
      figure.append(make("span", "", `log-probability ${caption.logProbability.toFixed(2).replace("-", "−")}`));
    }
    item.querySelector(".copy").addEventListener("click", (event) => {
      copy(event.currentTarget, caption.text);
    });
    return item;
  }

  function showLarge(record) {
    const shownImage = thumbnail(record);
    shownImage.loading = "eager";
    byId("stage").replaceChildren(shownImage);
    if (record.original === null) return;
    // The thumbnail stays until the image has loaded, and forever if it is missing.
    const large = new Image();
    large.src = record.original;
    large.decode().then(
      () => {
        if (!shownImage.isConnected) return;
        shownImage.width = large.naturalWidth;
        shownImage.height = large.naturalHeight;
        shownImage.src = record.original;
      },
      () => {},
    );
  }

  function show(position) {
    const record = shown[position];
    current = position;
    showLarge(record);
    byId("viewer-name").firstElementChild.textContent = record.name;
    byId("viewer-place").textContent =
      `${(position + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    byId("viewer-captions").replaceChildren(
      ...record.captions.map((caption, rank) => spoken(caption, rank === 0)),
    );
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
      record.score === null ? "" : `CIDEr-D of the best caption: ${record.score.toFixed(1)}`;
    byId("previous").setAttribute("aria-disabled", position === 0);
    byId("next").setAttribute("aria-disabled", position === shown.length - 1);
    byId("sheet").scrollTop = 0;
  }

  function step(distance) {
    const position = current + distance;
    if (position < 0 || position >= shown.length) return;
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
      byId("announcement").textContent = "";
      show(position);
      viewer.showModal();
    }
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const distance = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (distance) {
      event.preventDefault();
      step(distance);
    }
  });
  // Focus returns to the card of the image shown last.
  viewer.addEventListener("close", () => {
    draw(current + 1);
    byId("stage").replaceChildren();
    grid.children[current].querySelector(".open").focus();
  });

  // Light and dark

  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showTheme = () => byId("theme").setAttribute("aria-pressed", isDark());
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
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
  sort();
})();

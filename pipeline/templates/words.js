"use strict";

// What the gallery and the local page share: the words of a caption and how they are shown.

const DOUBTFUL = 0.3; // below this probability a word is shaded
// Words that are improbable because others fit as well ("a", "the"), not because they are wrong.
const FUNCTION_WORDS = new Set(
  ("a an the this that some one two in on at of with by to for from into near and or while as is are "
    + "be it its his her their there 's").split(" "),
);
const NO_BREAK = "\u00a0";

function percent(share) {
  return `${share < 0.01 ? "< 1" : Math.round(100 * share)}${NO_BREAK}%`;
}

function signed(value) {
  return value.toFixed(2).replace("-", "−");
}

// A caption's confidence, marked where captions are wrong more often; see docs/results.md for the
// threshold. It is rounded down, so that the number shown is below the threshold where the mark is.
const LOW_CONFIDENCE = 0.3;
function confidence(share) {
  const floor = Math.floor(100 * share) / 100;
  const low = floor < LOW_CONFIDENCE;
  const part = document.createElement("span");
  part.className = low ? "low" : "explained";
  part.textContent = `${low ? "low " : ""}confidence ${percent(floor)}`;
  part.title = `The mean probability of the caption’s words (geometric) under the model. Below ${
    percent(LOW_CONFIDENCE)}, first captions of the pretrained model are wrong nearly twice as often.`;
  return part;
}

// The caption as nodes, with an element per word. `words` are the model's tokens and their
// probabilities; the text is the caption's, where "dog 's" may be "dog's", and "a" at its start "A".
function captionNodes(caption, words) {
  const nodes = [];
  const lower = caption.toLowerCase();
  let place = 0;
  for (const [text, probability] of words) {
    const start = lower.indexOf(text.toLowerCase(), place);
    if (start < 0) continue;
    const word = document.createElement("span");
    word.className = "word";
    word.textContent = caption.slice(start, start + text.length);
    if (probability !== null) {
      word.title = percent(probability);
      word.dataset.percent = probability < 0.01 ? "<1" : Math.round(100 * probability);
      const doubt = FUNCTION_WORDS.has(text.toLowerCase()) ? 0 : 1 - probability / DOUBTFUL;
      if (doubt > 0) word.style.setProperty("--doubtful", (0.3 + 0.7 * doubt).toFixed(3));
    }
    nodes.push(caption.slice(place, start), word);
    place = start + text.length;
  }
  return [...nodes, caption.slice(place)];
}

// Shades an image but for the parts that speak for a word: 8 x 8 cells in percent, row by row. The
// canvas lies on the image and has its shape.
const CELLS = 8;
function drawCells(canvas, cells, width, height) {
  const small = document.createElement("canvas");
  small.width = small.height = CELLS;
  const pixels = new ImageData(CELLS, CELLS);
  cells.forEach((cell, place) => { pixels.data[4 * place + 3] = 200 * (1 - cell / 100); });
  small.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
}

// What a caption's place in the order comes from. `parts` maps the addends of its score to numbers.
const PARTS = {
  likelihood: "log-probability, normalised by length",
  matching: "image-text match",
  consensus: "phrases predicted for the image",
};
function scoreOf(parts) {
  return Object.values(parts).reduce((sum, part) => sum + part, 0);
}
function explainScore(parts, logProbability) {
  return [
    ...Object.entries(parts).map(([name, value]) => `${signed(value)}  ${PARTS[name]}`),
    `log-probability of the caption: ${signed(logProbability)} nats`,
  ].join("\n");
}

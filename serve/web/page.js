// The visitors' page: one request at a time; the server's own words where something is wrong.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form"), prompt = $("prompt"), canvas = $("canvas"), picture = $("picture");
let painting = false;
let usualMs = 6000; // how long the last picture took
let pictureUrl = "";
let shownPrompt = "";

const KIND_WORDS = {
  429: "Many visitors are painting at the moment. Please try again in a little while.",
  502: "The studio is not open yet. Please try again in a minute.",
  503: "The studio is not open yet. Please try again in a minute.",
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  paint(prompt.value);
});
for (const idea of document.querySelectorAll(".ideas button")) {
  idea.addEventListener("click", () => {
    prompt.value = idea.textContent;
    paint(prompt.value);
  });
}
$("another").addEventListener("click", () => paint(shownPrompt));

async function paint(words) {
  if (painting) return;
  if (!words.trim()) {
    complain("Please say what the artwork should show: a few words are enough.", true);
    return;
  }
  complain("");
  const started = performance.now();
  const stopClock = begin(started);
  try {
    const made = await ask(words);
    usualMs = performance.now() - started;
    await show(words, made);
    stopClock("done");
  } catch (error) {
    stopClock(picture.hidden ? "empty" : "shown");
    complain(error.message, error.isAboutThePrompt);
  }
}

async function ask(words) {
  let response;
  try {
    response = await fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt: words }),
    });
  } catch {
    throw new Error("The studio does not answer. Please check the connection and try again.");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok && answer.data?.[0]?.b64_json) return answer;
  const problem = new Error(KIND_WORDS[response.status] ?? answer.error?.message ?? "Something went wrong. Please try again.");
  problem.isAboutThePrompt = answer.error?.param === "prompt";
  throw problem;
}

async function show(words, answer) {
  const made = answer.data[0];
  const bytes = Uint8Array.from(atob(made.b64_json), (letter) => letter.charCodeAt(0));
  URL.revokeObjectURL(pictureUrl);
  pictureUrl = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  picture.src = pictureUrl;
  picture.alt = `Generated artwork: ${words}`;
  await picture.decode();
  shownPrompt = words;
  picture.hidden = false;
  $("title").textContent = words.trim();
  $("title").title = made.revised_prompt;
  $("medium").textContent = `Latent diffusion, ${picture.naturalWidth} × ${picture.naturalHeight} pixels, ${new Date().getFullYear()}`;
  $("seed").textContent = made.seed;
  $("checkpoint").textContent = answer.model;
  $("download").href = pictureUrl;
  $("download").download = `${fileName(words)}-${made.seed}.png`;
  $("label").hidden = false;
}

function fileName(words) {
  return words.trim().toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "artwork";
}

// Starts the waiting display; the returned function ends it and gives the canvas its next state.
function begin(started) {
  setBusy(true);
  canvas.dataset.state = "painting";
  $("waiting").hidden = false;
  $("status").textContent = "Painting";
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  canvas.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
  const tick = () => {
    const passedMs = performance.now() - started;
    const done = 1 - Math.exp((-1.6 * passedMs) / usualMs); // an estimate: quick at first, never quite full
    $("bar").style.setProperty("--done", done.toFixed(3));
    $("bar").setAttribute("aria-valuenow", Math.round(done * 100));
    $("elapsed").textContent = `Painting … ${Math.floor(passedMs / 1000)} s`;
  };
  tick();
  const clock = setInterval(tick, 250);
  return (state) => {
    clearInterval(clock);
    setBusy(false);
    $("waiting").hidden = true;
    canvas.dataset.state = state;
    $("status").textContent = state === "done" ? "Your artwork is ready" : "";
  };
}

function setBusy(busy) {
  painting = busy;
  for (const button of document.querySelectorAll("button")) button.setAttribute("aria-disabled", String(busy));
}

function complain(message, aboutThePrompt = false) {
  $("problem").textContent = message;
  prompt.setAttribute("aria-invalid", String(aboutThePrompt));
  if (aboutThePrompt) prompt.focus();
}

// The visitors' page: one request at a time; the server's own words where something is wrong.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form"), prompt = $("prompt"), canvas = $("canvas"), picture = $("picture");
let painting = false;
let usualMs = 6000; // how long the last picture took
let pictureUrl = "";
let shownPrompt = "";
let shown = null; // the picture on the wall, as a PNG
const progress = { done: 0, place: null };

const KIND_WORDS = {
  401: "This studio is for its own visitors: open it with the address that the museum gave you.",
  403: "This studio is for its own visitors: open it with the address that the museum gave you.",
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
$("like").addEventListener("click", () => paint(shownPrompt, shown));
$("compare").addEventListener("click", compare);
$("skip").addEventListener("click", () => put(null));
for (const button of document.querySelectorAll("[data-better]")) {
  button.addEventListener("click", () => vote(button.dataset.better));
}
$("own").addEventListener("change", () => {
  const file = $("own").files[0];
  $("own").value = "";
  if (file) paint(prompt.value, file);
});

// `like`: a picture to begin from, this one or the visitor's own.
async function paint(words, like = null) {
  if (painting) return;
  if (!words.trim()) {
    complain("Please say what the artwork should show: a few words are enough.", true);
    return;
  }
  complain("");
  put(null);
  const started = performance.now();
  const stopClock = begin(started);
  try {
    const made = await ask(words, like, preview, (place) => (progress.place = place));
    usualMs = performance.now() - started;
    await show(words, made);
    stopClock("done");
  } catch (error) {
    stopClock(picture.hidden ? "empty" : "shown");
    complain(error.message, error.isAboutThePrompt);
  }
}

// A kiosk's key comes behind the address' #key=..., which no server ever sees, and stays in this tab.
const fragment = new URLSearchParams(location.hash.slice(1)).get("key");
if (fragment) {
  sessionStorage.setItem("key", fragment);
  history.replaceState(null, "", location.pathname + location.search);
}

function headers(more) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// A second opinion is asked for only where the server has another checkpoint to compare with.
fetch("healthz").then((answer) => answer.json()).then((health) => ($("compare").hidden = !health.challenger)).catch(() => {});

let pair = null; // two pictures of the words on the wall that wait for a vote

async function compare() {
  if (painting) return;
  complain("");
  put(null);
  const stopClock = begin(performance.now());
  try {
    put(await post("v1/comparisons", { prompt: shownPrompt }));
    $("question").focus();
  } catch (error) {
    complain(error.message);
  } finally {
    stopClock("shown");
  }
}

// Shows two pictures to choose from, or none.
function put(compared) {
  pair = compared;
  $("thanks").textContent = "";
  $("pair").hidden = !pair;
  for (const [index, id] of ["first", "second"].entries()) {
    URL.revokeObjectURL($(id).src);
    $(id).removeAttribute("src");
    if (!pair) continue;
    $(id).src = URL.createObjectURL(asPng(pair.data[index].b64_json));
    $(id).alt = `The ${id} picture: ${shownPrompt}`;
  }
}

async function vote(better) {
  if (painting || !pair) return;
  const { id } = pair;
  try {
    await post(`v1/comparisons/${id}/vote`, { better });
    put(null);
    $("thanks").textContent = "Thank you: your vote counts for what hangs here next.";
  } catch (error) {
    $("thanks").textContent = error.message;
  }
}

async function post(path, fields) {
  const response = await answered(path, { headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(fields) });
  return response.json();
}

// The server's answer, if it is a good one.
async function answered(path, options) {
  let response;
  try {
    response = await fetch(path, { method: "POST", ...options });
  } catch {
    throw new Error("The studio does not answer. Please check the connection and try again.");
  }
  if (!response.ok) throw problem(response.status, await response.json().catch(() => ({})), response.headers.get("Retry-After"));
  return response;
}

// Asks for words, or for words and a picture to begin from; resolves to the last event of the stream.
async function ask(words, like, onPreview, onPlace) {
  const body = new FormData();
  const fields = { prompt: words, stream: true, partial_images: 3 };
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  if (like) body.append("image", like, "picture.png");
  const response = await answered(like ? "v1/images/edits" : "v1/images/generations", {
    headers: like ? headers({}) : headers({ "Content-Type": "application/json" }),
    body: like ? body : JSON.stringify(fields),
  });
  let made = null;
  await eachEvent(response.body, (name, data) => {
    if (name === "place") onPlace(data);
    else if (name.endsWith(".partial_image")) onPreview(data);
    else if (name.endsWith(".completed")) made = data;
    else if (name === "error") throw problem(0, data);
  });
  if (!made) throw new Error("The studio stopped in the middle of your picture. Please try again.");
  return made;
}

function problem(status, answer, waitS = null) {
  const crowd = `Many visitors are painting at the moment. Please try again in about ${waitS} s.`;
  const error = new Error((status === 429 && waitS ? crowd : KIND_WORDS[status]) ?? answer.error?.message ?? "Something went wrong. Please try again.");
  error.isAboutThePrompt = answer.error?.param === "prompt";
  return error;
}

// Server-sent events, one by one; a comment is a place in line.
async function eachEvent(stream, handle) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const comment = lines.find((line) => line.startsWith(": {"));
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (comment) handle("place", JSON.parse(comment.slice(2)));
      else if (name && data) handle(name, JSON.parse(data));
    }
  }
}

function asPng(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

async function preview(data) {
  const address = URL.createObjectURL(asPng(data.b64_json));
  const image = $("preview");
  image.src = address;
  await image.decode().catch(() => {});
  URL.revokeObjectURL(address);
  if (!painting) return;
  image.hidden = false;
  progress.done = data.step / data.steps;
}

async function show(words, made) {
  URL.revokeObjectURL(pictureUrl);
  shown = asPng(made.b64_json);
  pictureUrl = URL.createObjectURL(shown);
  picture.src = pictureUrl;
  picture.alt = `Generated artwork: ${words}`;
  await picture.decode();
  shownPrompt = words;
  picture.hidden = false;
  $("title").textContent = words.trim();
  $("title").title = made.revised_prompt;
  $("medium").textContent = `Latent diffusion, ${picture.naturalWidth} × ${picture.naturalHeight} pixels, ${new Date().getFullYear()}`;
  $("seed").textContent = made.seed;
  $("checkpoint").textContent = made.checkpoint;
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
  Object.assign(progress, { done: 0, place: null });
  const tick = () => {
    const passedMs = performance.now() - started;
    const guess = 1 - Math.exp((-1.6 * passedMs) / usualMs); // an estimate: quick at first, never quite full
    const done = Math.max(progress.done, progress.place?.position > 0 ? 0 : guess);
    $("bar").style.setProperty("--done", done.toFixed(3));
    $("bar").setAttribute("aria-valuenow", Math.round(done * 100));
    $("elapsed").textContent = inWords(passedMs);
  };
  tick();
  const clock = setInterval(tick, 250);
  return (state) => {
    clearInterval(clock);
    setBusy(false);
    $("waiting").hidden = true;
    $("preview").hidden = true;
    canvas.dataset.state = state;
    $("status").textContent = state === "done" ? "Your artwork is ready" : "";
  };
}

function inWords(passedMs) {
  const place = progress.place;
  if (!place?.position) return `Painting … ${Math.floor(passedMs / 1000)} s`;
  const soon = `about ${Math.max(1, Math.round(place.eta_s))} s`;
  return place.position === 1 ? `You are next: ${soon}` : `${place.position - 1} before you: ${soon}`;
}

function setBusy(busy) {
  painting = busy;
  for (const button of document.querySelectorAll("button")) button.setAttribute("aria-disabled", String(busy));
  $("own").disabled = busy;
}

function complain(message, aboutThePrompt = false) {
  $("problem").textContent = message;
  prompt.setAttribute("aria-invalid", String(aboutThePrompt));
  if (aboutThePrompt) prompt.focus();
}

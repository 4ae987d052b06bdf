// The playground: keeps a key for this tab, streams an answer, and resumes it after a lost connection.
// Data from outside enters the page as text, never as HTML.

// The gateway sends something at least every 12 s, so a connection that is silent for longer is broken.
const SILENT_MS = 30_000;
// Pauses between attempts to resume; the last one repeats. A gateway keeps a request 15 s without its client.
const AGAIN_MS = [500, 1000, 2000, 4000];
const PAGE = 20;
const HELD = "rift-key";
// KEY: what a header can hold. ID: an answer's x-request-id may be a proxy's instead.
const KEY = /^[\x21-\x7e]+$/;
const ID = /^req_[0-9a-z_-]+$/;

const NO_KEY = "This is not a key; one begins with rift_ and has only letters, digits and _. Copy it again.";
const LOST = "The connection broke before the request had an id. If it was accepted, it is among the recent requests.";

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const say = (words, left = "") => { $("status").textContent = words; $("left").textContent = left; };

let key = sessionStorage.getItem(HELD) ?? "";
let current = null; // the run on the screen
let oldest = ""; // the id of the last request in the list
let lists = 0; // counts started and dropped list calls: only the last one is shown

/** Show an error: next to the key until there is one, then in place of the answer. */
function complain(words) {
  for (const place of [$("refused"), $("problem")]) {
    place.textContent = words;
    place.hidden = !words;
  }
}

function call(path, { headers, ...options } = {}) {
  return fetch(path, { cache: "no-store", ...options, headers: { Authorization: `Bearer ${key}`, ...headers } });
}

/** Return the service's own error message. */
async function words(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `The gateway answered with status ${response.status}.`;
  }
}

// --- the key ---------------------------------------------------------------------------------------------

async function enter() {
  try {
    if (!KEY.test(key)) throw new Error(NO_KEY);
    const response = await call("/v1/models");
    if (!response.ok) throw new Error(await words(response));
    list((await response.json()).data);
    const version = await call("/version");
    $("simulated").hidden = !version.ok || (await version.json()).engine !== "sim";
  } catch (error) {
    sessionStorage.removeItem(HELD);
    $("key").value = key;
    show(false);
    return complain(error instanceof TypeError ? "The gateway cannot be reached." : error.message);
  }
  $("key").value = "";
  complain("");
  sessionStorage.setItem(HELD, key);
  $("held-key").textContent = key.split("_").slice(0, 2).join("_") + "_…";
  show(true);
  $("prompt").focus();
  recent();
}

function forget() {
  leave();
  key = $("key").value = "";
  sessionStorage.removeItem(HELD);
  complain("");
  clear();
  say("Nothing asked yet");
  lists += 1;
  $("recent").replaceChildren();
  $("more").hidden = true;
  $("prompt").value = "";
  show(false);
  $("key").focus();
}

function show(entered) {
  $("enter").hidden = entered;
  $("bench").hidden = $("held").hidden = !entered;
}

function list(models) {
  $("model").replaceChildren(...models.map((model) => {
    const starts = model.ready ? "" : " – starts on request";
    return new Option(model.id + starts, model.id, model.default, model.default);
  }));
  if (!models.length) complain("This gateway serves no model now.");
}

// --- one request -----------------------------------------------------------------------------------------

/** A request that this page follows. `after` is the id of the last event received. */
function Run(id = "") {
  Object.assign(this, {
    id, after: "0", isStopped: false, abort: new AbortController(), began: performance.now(), first: null,
  });
}

function leave() {
  current?.abort.abort();
  current = null;
  busy(false);
}

function clear() {
  $("text").textContent = $("reasoning").textContent = "";
  for (const name of ["ttft", "speed", "used", "charge", "request"]) $(name).textContent = "–";
}

function begin(run, words) {
  leave();
  current = run;
  complain("");
  clear();
  say(words);
  busy(true);
}

/** Keep the focus when one button replaces the other. */
function busy(is) {
  const focused = document.activeElement;
  $("output").ariaBusy = String(is);
  $("send").disabled = is;
  $("stop").disabled = !is;
  if (is && focused === $("send")) $("stop").focus();
  if (!is && focused === $("stop")) $("send").focus();
}

async function ask() {
  const run = new Run();
  begin(run, "Sending");
  const body = { model: $("model").value, prompt: $("prompt").value, parameters: {}, stream: true };
  if ($("temperature").value) body.parameters.temperature = $("temperature").valueAsNumber;
  if ($("tokens").value) body.parameters.max_tokens = $("tokens").valueAsNumber;
  const headers = { "Content-Type": "application/json" };
  try {
    const options = { method: "POST", headers, body: JSON.stringify(body), signal: run.abort.signal };
    const response = await call("/v1/inference", options);
    if (!response.ok) return fail(run, await words(response));
    const id = response.headers.get("x-request-id");
    if (ID.test(id)) name(run, id);
    await follow(run, response);
  } catch (error) {
    if (run === current) fail(run, `The gateway cannot be reached: ${error.message}.`);
  }
}

/** Follow a request to its end, reconnecting as often as needed. */
async function follow(run, response) {
  for (let tries = 0; run === current; tries += 1) {
    try {
      response ??= await resume(run);
      if (response.status === 204) return end(run, await (await call(`/v1/inference/${run.id}`)).json());
      if (!response.ok && response.status < 500 && response.status !== 429) {
        return fail(run, await words(response));
      }
      if (response.ok) {
        for await (const frame of frames(run, response)) {
          tries = 0;
          if (take(run, frame)) return;
        }
      }
    } catch {
      // The connection broke: the next events follow `run.after`.
    }
    response = null;
    if (run !== current) return;
    if (!run.id) return fail(run, LOST);
    const wait = AGAIN_MS[Math.min(tries, AGAIN_MS.length - 1)];
    say("Connection lost", `resuming in ${wait / 1000} s`);
    await sleep(wait);
  }
}

function resume(run) {
  return call(`/v1/inference/${run.id}/events`, {
    headers: { "Last-Event-ID": run.after },
    signal: run.abort.signal,
  });
}

/** Yield the fields of each event of the stream. */
async function* frames(run, response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const silent = setTimeout(() => reader.cancel(), SILENT_MS);
    const { value, done } = await reader.read().finally(() => clearTimeout(silent));
    if (done || run !== current) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const frame = {};
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        if (at > 0) frame[line.slice(0, at)] = line.slice(at + 2);
      }
      if (frame.data) yield frame;
    }
  }
}

/** Process one event; return whether it was the last. */
function take(run, frame) {
  if (run !== current) return true;
  const data = JSON.parse(frame.data);
  run.after = frame.id;
  name(run, data.id);
  if (frame.event === "status") {
    tell(run, data);
  } else if (frame.event === "token") {
    write(run, data);
  } else if (frame.event === "done") {
    end(run, data);
    return true;
  } else if (frame.event === "error" && !data.resume) {
    fail(run, data.error.message);
    return true;
  }
  return false;
}

function name(run, id) {
  if (run.id === id) return;
  run.id = id;
  $("request").textContent = id;
  if (run.isStopped) stop();
}

const STATUS = { queued: "Queued", starting: "Starting the model", running: "Running" };

/** Count the estimate down between two messages of the gateway. */
function tell(run, { status, estimate_ms: estimate }) {
  clearInterval(run.countdown);
  say(STATUS[status] ?? status);
  if (status !== "starting") return;
  const from = performance.now() + (estimate ?? 0);
  const count = () => {
    const seconds = Math.round((from - performance.now()) / 1000);
    $("left").textContent = estimate === undefined ? `for ${-seconds} s` : `about ${Math.max(seconds, 0)} s left`;
  };
  run.countdown = setInterval(() => (run === current ? count() : clearInterval(run.countdown)), 1000);
  count();
}

function write(run, { index, delta, reasoning }) {
  const output = $("output");
  const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  if (reasoning) $("reasoning").append(reasoning);
  // Many models' answers begin with a space.
  $("text").append($("text").firstChild ? delta : delta.trimStart());
  if (isAtEnd) output.scrollTop = output.scrollHeight;
  const now = performance.now();
  if (!run.first) {
    run.first = { index, at: now };
    clearInterval(run.countdown);
    if (!index) $("ttft").textContent = `${Math.round(now - run.began)} ms`;
  }
  if ($("status").textContent !== STATUS.running) say(STATUS.running);
  if (now - run.first.at > 500) {
    $("speed").textContent = rate(index - run.first.index, now - run.first.at);
  }
  $("used").textContent = `– / ${index + 1}`;
}

const rate = (tokens, ms) => `${((tokens * 1000) / ms).toFixed(1)} tokens/s`;
const ENDS = { stop: "Finished", length: "Finished: max tokens reached", cancelled: "Stopped", tool_calls: "Finished" };

/** Under plan per_second, only the most that a request costs is known. */
function cost({ usd, at_most_nanousd: most }) {
  return usd ? `$${usd}` : `at most $${(most / 1e9).toFixed(9)}`;
}

/** Show the figures of the last event: they come from the log and are what is charged. */
function end(run, { usage, charge, timing, finish_reason: reason, error }) {
  if (error) return fail(run, error.message);
  if (timing.ttft_ms !== null) $("ttft").textContent = `${Math.round(timing.ttft_ms)} ms`;
  const ms = timing.total_ms - timing.ttft_ms;
  if (usage.output_tokens > 1 && ms > 0) $("speed").textContent = rate(usage.output_tokens - 1, ms);
  $("used").textContent = `${usage.prompt_tokens} / ${usage.output_tokens}`;
  $("charge").textContent = charge ? cost(charge) : "by the second";
  finish(run, ENDS[reason] ?? reason);
}

function fail(run, words) {
  complain(words);
  finish(run, "Failed");
}

function finish(run, words) {
  clearInterval(run.countdown);
  if (run !== current) return;
  say(words);
  current = null;
  busy(false);
  recent();
}

/** Cancel the request, now or once its id is known. The stream then ends with its charge. */
async function stop() {
  const run = current;
  if (!run) return;
  run.isStopped = true;
  say("Stopping");
  if (!run.id) return;
  try {
    const response = await call(`/v1/inference/${run.id}`, { method: "DELETE" });
    if (!response.ok) complain(await words(response));
  } catch {
    complain("The gateway cannot be reached: the request continues. Try again.");
  }
}

// --- recent requests -------------------------------------------------------------------------------------

/** Add a page of requests. After an error the list and its button for more stay as they are. */
async function recent(after = "") {
  const query = new URLSearchParams(after ? { limit: PAGE, after } : { limit: PAGE });
  const asked = (lists += 1);
  let page = null;
  let note = "None yet.";
  try {
    const response = await call(`/v1/inference?${query}`);
    if (response.ok) page = await response.json();
    else if (response.status === 404) note = "This gateway cannot list requests.";
    else note = await words(response);
  } catch {
    note = "The gateway cannot be reached.";
  }
  if (asked !== lists) return;
  if (page) {
    const rows = page.data.map(row);
    if (after) $("recent").append(...rows);
    else $("recent").replaceChildren(...rows);
    oldest = page.data.at(-1)?.id ?? oldest;
    $("more").hidden = !page.has_more;
  }
  $("note").textContent = note;
  $("note").hidden = page !== null && $("recent").childElementCount > 0;
}

function row({ id, model, status, created, usage, charge }) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = id;
  const texts = [
    model,
    status,
    new Date(created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
    charge ? cost(charge) : `${usage?.output_tokens ?? 0} tokens`,
  ];
  for (const text of texts) {
    button.append(Object.assign(document.createElement("span"), { textContent: text }), " ");
  }
  button.addEventListener("click", () => {
    const run = new Run();
    begin(run, "Reading");
    name(run, id);
    run.first = { index: 0, at: Infinity }; // a replayed answer shows no speed
    follow(run, null);
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

// ---------------------------------------------------------------------------------------------------------

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  enter();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!current) ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", stop);
$("forget").addEventListener("click", forget);
$("again").addEventListener("click", () => recent());
$("more").addEventListener("click", () => recent(oldest));
if (key) enter();
else forget();

// What every page can do: keys, the theme, the value of the token under the pointer or the keyboard.
// Pages work without it; charts are drawn by chart.js.

const root = document.documentElement;

// --- theme
const button = document.getElementById("theme");
function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function showTheme() {
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Use the ${button.textContent.toLowerCase()} theme`);
}
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  showTheme();
  document.dispatchEvent(new Event("themechange"));
});
showTheme();

// --- times, in the reader's own zone
for (const time of document.querySelectorAll("time[data-seconds]")) {
  time.textContent = new Date(1000 * time.dataset.seconds).toLocaleTimeString();
}

// --- values of tokens: one label, beside the token that is pointed at or stepped to
const label = document.createElement("output");
label.className = "value";
label.hidden = true;
document.body.append(label);
let told = null;
function tell(token) {
  told = token;
  label.hidden = !token;
  if (!token) return;
  label.textContent = token.dataset.v;
  const box = token.getClientRects()[0];
  label.style.left = `${Math.max(4, Math.min(box.left, innerWidth - label.offsetWidth - 4))}px`;
  label.style.top = `${box.top - label.offsetHeight - 4}px`;
}
for (const moved of ["scroll", "resize"]) addEventListener(moved, () => tell(told), { capture: true, passive: true });
document.addEventListener("pointerover", (event) => tell(event.target.closest?.("[data-v]")));
document.addEventListener("focusin", (event) => tell(event.target.closest?.("[data-v]")));
document.addEventListener("click", (event) => {
  const token = event.target.closest?.("[data-v]");
  if (token) tell(token);
});

function stepTokens(by) {
  const tokens = [...document.querySelectorAll("[data-v]")].filter((each) => each.checkVisibility());
  const at = tokens.indexOf(document.activeElement);
  const seen = (each) => each.getBoundingClientRect().top >= 0;
  const next = at < 0 ? (tokens.find(seen) ?? tokens[0]) : tokens[Math.max(0, Math.min(tokens.length - 1, at + by))];
  next?.focus();
}

// --- rows of a table: j and k step through them, Enter opens the first link of one
const rows = [...document.querySelectorAll("table.stepped tbody tr")];
let row = -1;
function step(by) {
  rows[row]?.removeAttribute("aria-selected");
  row = Math.max(0, Math.min(rows.length - 1, row + by));
  rows[row]?.setAttribute("aria-selected", "true");
  rows[row]?.scrollIntoView({ block: "nearest" });
}

// --- parts of pages: links and forms that are fetched when they are asked for, or at once; without scripts
// they lead to pages of their own
async function take(address, place) {
  place.setAttribute("aria-busy", "true");
  const answer = await fetch(address);
  const part = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main, .part");
  part?.querySelectorAll(".alone").forEach((each) => each.remove());
  place.replaceChildren(...(part?.childNodes ?? []));
  place.removeAttribute("aria-busy");
}
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-expand]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const place = document.createElement("div");
  link.replaceWith(place);
  take(link.dataset.expand, place);
});
document.addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-expand]");
  if (!form) return;
  event.preventDefault();
  let place = form.nextElementSibling;
  if (!place?.matches(".taken")) form.after((place = Object.assign(document.createElement("div"), { className: "taken" })));
  take(`${form.getAttribute("action")}?${new URLSearchParams(new FormData(form))}`, place).then(() => form.removeAttribute("aria-busy"));
});
for (const link of document.querySelectorAll("a[data-load]")) take(link.href, link.parentElement);

// --- what takes a while says so
addEventListener("submit", (event) => event.target.setAttribute("aria-busy", "true"));
addEventListener("pageshow", () => document.querySelector("form[aria-busy]")?.removeAttribute("aria-busy"));

// --- keys: a page's links and forms name theirs in data-key
const dialog = document.getElementById("keys");
const keyed = () => [...document.querySelectorAll("[data-key]")];
function showKeys() {
  const list = document.createElement("dl");
  const names = keyed().map((each) => [each.dataset.key, each.dataset.words ?? each.textContent.trim()]);
  for (const [key, words] of [...names, ["j k", "step through the rows of a table, Enter opens one"], ["v", "to the first shaded token; ← → to others"], ["/", "to the first field"], ["?", "these keys"], ["Esc", "close, leave a field"]]) {
    const term = document.createElement("dt");
    term.append(Object.assign(document.createElement("kbd"), { textContent: key }));
    list.append(term, Object.assign(document.createElement("dd"), { textContent: words }));
  }
  dialog.replaceChildren(list);
  dialog.showModal();
}
dialog.addEventListener("click", () => dialog.close());
document.addEventListener("keydown", (event) => {
  const field = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape") {
    tell(null);
    return document.activeElement?.blur();
  }
  if (field || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") return showKeys();
  if (event.key === "/") {
    event.preventDefault();
    return document.querySelector("main input:not([type=hidden]), main textarea")?.focus();
  }
  if (event.key === "v") return stepTokens(0);
  if (event.target.matches?.("[data-v]") && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    event.preventDefault();
    return stepTokens(event.key === "ArrowRight" ? 1 : -1);
  }
  if (rows.length && (event.key === "j" || event.key === "k")) return step(event.key === "j" ? 1 : -1);
  if (event.key === "Enter" && row >= 0 && event.target === document.body) return rows[row].querySelector("a").click();
  const target = keyed().find((each) => each.dataset.key === event.key);
  if (!target) return;
  event.preventDefault();
  target.matches("a, button, summary") ? target.click() : target.focus();
});

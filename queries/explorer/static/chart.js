// Draws each <figure data-chart> from the JSON of the data block inside it, or of the address in data-from.
// Colours are those of the page's theme: `$name` in a chart is the variable --name of explorer.css.
// A mark that stands for a feature or an SAE opens its page.
// A selection called `brush` is told to the page as an event `brush`, with the spans of the axes' fields.

const styles = () => getComputedStyle(document.documentElement);
function themed(chart, look) {
  if (Array.isArray(chart)) return chart.map((each) => themed(each, look));
  if (chart && typeof chart === "object") {
    return Object.fromEntries(Object.entries(chart).map(([key, value]) => [key, themed(value, look)]));
  }
  if (typeof chart === "string" && chart.startsWith("$")) {
    return look.getPropertyValue(`--${chart.slice(1)}`).trim() || chart;
  }
  return chart;
}
function config(look) {
  const [ink, faint, line] = ["ink", "faint", "line"].map((name) => look.getPropertyValue(`--${name}`).trim());
  const words = { labelColor: faint, titleColor: ink, labelFont: "sans-serif", titleFont: "sans-serif", titleFontWeight: "normal" };
  return {
    background: null,
    view: { stroke: line },
    axis: { ...words, gridColor: line, domainColor: line, tickColor: line },
    legend: words,
    text: { color: ink },
  };
}
async function draw(figure) {
  const look = styles();
  if (!figure.chart) {
    const block = figure.querySelector("script");
    figure.chart = block ? JSON.parse(block.textContent) : await (await fetch(figure.dataset.from)).json();
  }
  if (figure.chart.error) return void (figure.textContent = figure.chart.error);
  figure.view?.finalize();
  let target = figure.querySelector(".plot");
  if (!target) figure.prepend((target = Object.assign(document.createElement("div"), { className: "plot" })));
  const options = { mode: "vega-lite", ast: true, actions: false, defaultStyle: false, tooltip: tooltip, renderer: "canvas" };
  const result = await vegaEmbed(target, { ...themed(figure.chart, look), config: config(look) }, options);
  figure.view = result.view;
  if (result.view.getState().signals?.brush !== undefined) {
    let waiting;
    result.view.addSignalListener("brush", (_, spans) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => figure.dispatchEvent(new CustomEvent("brush", { bubbles: true, detail: spans })), 250);
    });
  }
  result.view.addEventListener("click", (_, item) => {
    const { sae = new URL(location).searchParams.get("sae"), feature } = item?.datum ?? {};
    if (!item?.datum || sae === null || (feature === undefined && item.datum.sae === undefined)) return;
    location.assign(feature === undefined ? `/sae?${new URLSearchParams({ sae })}` : `/feature?${new URLSearchParams({ sae, feature })}`);
  });
  figure.dataset.drawn = "";
}
// Vega's own tooltip brings a style sheet with it, which the pages' policy refuses.
const tip = Object.assign(document.createElement("output"), { className: "value tip", hidden: true });
document.body.append(tip);
function tooltip(_, event, item, value) {
  tip.hidden = value === null || value === undefined || value === "";
  if (tip.hidden) return;
  const words = typeof value === "object" ? Object.entries(value).map(([name, each]) => `${name}: ${each}`) : [String(value)];
  tip.textContent = words.join("\n");
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 12}px`;
}
const figures = [...document.querySelectorAll("figure[data-chart]")];
const drawAll = () =>
  Promise.all(figures.map(draw)).catch((error) => {
    console.error(error);
  });
drawAll();
document.addEventListener("themechange", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// How a scan gets on, told again every few seconds while one is at work and somebody looks.

const place = document.getElementById("status");
async function tell() {
  const { indexes } = await (await fetch("/status.json")).json();
  place.replaceChildren();
  for (const each of indexes) {
    const line = document.createElement("p");
    line.className = each.state === "complete" ? "faint" : "note";
    const speed = each.tokens_per_second ? `, ${Math.round(each.tokens_per_second).toLocaleString()} tokens/s` : "";
    const left = each.seconds_left ? `, ${Math.round(each.seconds_left / 60)} min left` : "";
    line.textContent = each.state
      ? `${each.state}: ${each.committed} of ${each.units} units${each.failed ? `, ${each.failed} failed` : ""}${speed}${left}`
      : each.error;
    place.append(line);
    if (each.state && each.state !== "complete") {
      const bar = Object.assign(document.createElement("progress"), { max: each.units, value: each.committed });
      bar.setAttribute("aria-label", "units committed");
      place.append(bar);
    }
  }
  return indexes.some((each) => each.state === "running" || each.state === "stale");
}
async function watch() {
  if (document.hidden || (await tell())) setTimeout(watch, 5000);
}
watch();

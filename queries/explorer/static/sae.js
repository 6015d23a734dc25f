// The map of an SAE: what is brushed goes into the address.

const figure = document.getElementById("map");
figure?.addEventListener("brush", (event) => {
  const { density, max } = event.detail ?? {};
  const address = new URL(location);
  const bounds = { min_density: density?.[0], max_density: density?.[1], min_max: max?.[0], max_max: max?.[1] };
  let moved = false;
  for (const [name, value] of Object.entries(bounds)) {
    const text = value === undefined ? null : String(value);
    if (Math.abs(Number(address.searchParams.get(name) ?? NaN) / value - 1) < 1e-9) continue;
    if (text === null && !address.searchParams.has(name)) continue;
    moved = true;
    text === null ? address.searchParams.delete(name) : address.searchParams.set(name, text);
  }
  if (!moved) return;
  address.searchParams.delete("page");
  location.assign(address);
});

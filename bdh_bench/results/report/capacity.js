// How many streams of a context fit a machine? The arithmetic of results/capacity_planning.py on the same rows of the run, without a network.
"use strict";
(() => {
  const place = document.getElementById("calculator");
  if (!place) return;
  const models = JSON.parse(document.getElementById("capacity-data").textContent);
  const rounding = 1 + 1e-9; // a value read at a measured place is what was measured

  // -- reading the rows -------------------------------------------------------------------------------------------

  // [[place, value], …] in order, read at a place inside its ends, straight in log-log.
  function read(curve, at) {
    if (!curve.length || at < curve[0][0] || at > curve.at(-1)[0]) return null;
    const right = curve.findIndex(([x]) => x >= at);
    const [x1, y1] = curve[right];
    if (x1 === at) return y1;
    const [x0, y0] = curve[right - 1];
    const share = (Math.log(at) - Math.log(x0)) / (Math.log(x1) - Math.log(x0));
    return Math.exp(Math.log(y0) + share * (Math.log(y1) - Math.log(y0)));
  }

  // [[batch, value], …] at a context, for batches with measured contexts on both sides of it.
  function overBatches(grid, context) {
    const batches = [...new Set(grid.map(([batch]) => batch))].sort((a, b) => a - b);
    const curveOf = (batch) => grid.filter((row) => row[0] === batch).map((row) => row.slice(1)).sort((a, b) => a[0] - b[0]);
    return batches.map((batch) => [batch, read(curveOf(batch), context)]).filter(([, value]) => value !== null);
  }

  function largest(curve, most, what) {
    const [first, last] = [curve[0][0], curve.at(-1)[0]];
    if (curve[0][1] > most) return first > 1 ? { streams: null } : { streams: 0, limit: what };
    let fits = last;
    while (fits > first && read(curve, fits) > most * rounding) fits -= 1;
    return { streams: fits, limit: fits === last ? `none met: ${whole(fits)} is the largest measured batch` : what };
  }

  function stateAt({ states, straight }, context) {
    const exact = states.find(([at]) => at === context);
    if (exact) return exact[1];
    if (states.length < 2) return null;
    let [low, high] = [states[0], states.at(-1)];
    if (context > low[0] && context < high[0]) {
      low = states.findLast(([at]) => at < context);
      high = states.find(([at]) => at > context);
    } else if (!straight) return null;
    const slope = (high[1] - low[1]) / (high[0] - low[0]);
    return Math.max(0, low[1] + Math.ceil(slope * (context - low[0]) - 1e-6));
  }

  // -- the two ways -----------------------------------------------------------------------------------------------

  function measured(model, wish) {
    const footprints = overBatches(model.footprints, wish.context);
    if (!footprints.length) return null;
    let found = largest(footprints, wish.memory, "memory");
    if (wish.latency !== null) {
      const steps = overBatches(model.tails.length ? model.tails : model.times, wish.context);
      if (!steps.length) return null;
      const quick = largest(steps, wish.latency, "latency");
      if (quick.streams === null || (found.streams !== null && quick.streams < found.streams)) found = quick;
    }
    if (found.streams === null) return null;
    const step = found.streams ? read(overBatches(model.times, wish.context), found.streams) : null;
    return { ...found, by: "measured", step, stepBy: "measured" };
  }

  function formula(model, wish) {
    const state = stateAt(model, wish.context);
    const unknown = (why) => ({ streams: null, by: "not measured", step: null, stepBy: "not measured", limit: `unknown: ${why}` });
    if (model.weights === null) return unknown("its weights were not counted");
    if (state === null) return unknown("its state was not counted around this context");
    const by = { by: "formula", stepBy: "formula", step: null };
    if (model.weights > wish.memory) return { ...by, streams: 0, limit: "memory: the weights alone need more" };
    let found = state ? { streams: Math.floor((wish.memory - model.weights) / state), limit: "memory" } : { streams: Infinity, limit: "none: it keeps nothing per stream" };
    if (wish.latency !== null && wish.bandwidth !== null) {
      const room = wish.latency * wish.bandwidth - model.weights;
      const quick = state ? Math.max(0, Math.floor(room / state)) : room < 0 ? 0 : Infinity;
      if (quick < found.streams) found = { streams: quick, limit: "latency" };
    } else if (wish.latency !== null) found.limit += " (not held against the latency: no bandwidth)";
    if (found.streams === Infinity) return { ...by, ...found, streams: null };
    const step = wish.bandwidth !== null && found.streams ? (model.weights + found.streams * state) / wish.bandwidth : null;
    return { ...by, ...found, step };
  }

  function capacity(model, wish) {
    const nothing = { streams: 0, by: "formula", step: null, stepBy: "formula" };
    const tooLong = model.positions !== null && wish.context > model.positions;
    const found = tooLong ? { ...nothing, limit: `position limit: ${whole(model.positions)} tokens` } : measured(model, wish) ?? formula(model, wish);
    const tokens = found.step && found.streams ? found.streams / found.step : null;
    return { ...found, tokens, cost: wish.price !== null && tokens ? (wish.price / (tokens * 3600)) * 1e6 : null };
  }

  // -- showing ----------------------------------------------------------------------------------------------------

  const whole = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 });
  const form = place.querySelector("form");

  function wished() {
    const value = (name) => {
      const text = form.elements[name].value;
      return text !== "" && Number(text) > 0 ? Number(text) : null;
    };
    const scaled = (name, by) => (value(name) === null ? null : value(name) * by);
    return {
      memory: Math.round((value("memory") ?? 0) * 2 ** 30), context: Math.round(value("context") ?? 1),
      latency: scaled("latency", 1e-3), price: value("price"), bandwidth: scaled("bandwidth", 1e9),
    };
  }

  const rows = [...place.querySelectorAll("tbody tr")]; // held, as a reader may sort them

  function answer() {
    const wish = wished();
    models.forEach((model, number) => {
      const { streams, by, tokens, step, stepBy, cost, limit } = capacity(model, wish);
      const cells = [...rows[number].cells].slice(1);
      const write = (cell, value, text, basis) => {
        cell.dataset.value = value ?? "";
        cell.textContent = value === null ? "—" : basis ? `${text(value)} (${basis})` : text(value);
      };
      write(cells[0], streams, whole, by);
      write(cells[1], tokens, short, stepBy);
      write(cells[2], step === null ? null : step * 1e3, short, stepBy);
      write(cells[3], cost, short, "");
      cells[4].textContent = limit;
    });
  }

  place.hidden = false;
  document.getElementById("capacity-fixed").hidden = true;
  form.addEventListener("input", answer);
  form.addEventListener("submit", (event) => event.preventDefault());
  answer();
})();

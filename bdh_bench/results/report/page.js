// What a reader can change on the page, and how the page is kept in its address: #m=bdh,llama&x=linear&q=recall&t=dark&cell=ab12.
// Everything here only shows what the page already holds. Static pictures and tables stay where this script does not run.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const models = data("model-names");

  // -- state and address -----------------------------------------------------------------------------------------

  const state = { models: new Set(models), x: "", query: "", theme: "", cell: "" };

  function readAddress() {
    let text = location.hash.slice(1);
    if (text.startsWith("cell-")) text = `cell=${text.slice(5)}`;
    const found = new URLSearchParams(text);
    const chosen = (found.get("m") ?? "").split(",").map(decodeURIComponent).filter((name) => models.includes(name));
    state.models = new Set(chosen.length ? chosen : models);
    state.x = found.get("x") === "linear" ? "linear" : "";
    state.query = found.get("q") ?? "";
    state.theme = ["light", "dark"].includes(found.get("t")) ? found.get("t") : "";
    state.cell = found.get("cell") ?? "";
  }

  function writeAddress() {
    const parts = new URLSearchParams();
    if (state.models.size < models.length) parts.set("m", [...state.models].map(encodeURIComponent).join(","));
    if (state.x) parts.set("x", state.x);
    if (state.query) parts.set("q", state.query);
    if (state.theme) parts.set("t", state.theme);
    if (state.cell) parts.set("cell", state.cell);
    const text = parts.toString();
    if (location.hash.slice(1) !== text) location.hash = text;
  }

  function change(values) {
    Object.assign(state, values);
    writeAddress();
    show();
  }

  function toggle(model) {
    const chosen = new Set(state.models);
    if (!chosen.delete(model)) chosen.add(model);
    change({ models: chosen.size ? chosen : new Set(models) });
  }

  // -- figures ----------------------------------------------------------------------------------------------------

  const figures = typeof Plotly === "undefined" ? {} : data("figure-data");
  const settings = { responsive: true, displaylogo: false, displayModeBar: false };

  function colours() {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(name).trim();
    return { ink: read("--ink"), grid: read("--grid"), paper: read("--raised") };
  }

  function dressed(layout) {
    const { ink, grid, paper } = colours();
    const size = window.innerWidth < 600 ? 11 : layout.font.size;
    const axis = (own) => ({ ...own, gridcolor: grid, linecolor: ink, tickcolor: ink });
    const x = state.x && layout.xaxis.type === "log" ? { ...layout.xaxis, type: state.x, range: undefined, autorange: true } : layout.xaxis;
    const hoverlabel = { bgcolor: paper, bordercolor: ink, font: { color: ink } };
    return { ...layout, font: { ...layout.font, color: ink, size }, xaxis: axis(x), yaxis: axis(layout.yaxis), hoverlabel };
  }

  function traces(lines) {
    const { ink } = colours();
    return lines.map((line) => {
      const visible = !line.meta || state.models.has(line.meta) ? true : "legendonly";
      if (line.name !== "marks" || line.line) return { ...line, visible };
      return { ...line, textfont: { color: ink, size: 11 }, marker: { ...line.marker, color: ink, line: { width: 2, color: ink } } };
    });
  }

  async function draw(place) {
    const figure = figures[place.dataset.figure];
    const picture = place.parentElement.querySelector(".static");
    place.hidden = false;
    place.style.height = `${figure.layout.height}px`;
    try {
      await Plotly.react(place, traces(figure.data), dressed(figure.layout), settings);
      picture.hidden = true;
      if (!place.dataset.ready) prepare(place);
    } catch (error) {
      place.hidden = true;
      picture.hidden = false;
      console.warn("figure stays static:", place.dataset.figure, error);
    }
  }

  function prepare(place) {
    place.dataset.ready = "1";
    place.on("plotly_legendclick", (event) => {
      const model = event.data[event.curveNumber].meta;
      if (model) toggle(model);
      return false;
    });
    place.on("plotly_legenddoubleclick", () => false);
    place.tabIndex = 0;
    place.addEventListener("keydown", (event) => walk(place, event));
  }

  // Arrow keys go from dot to dot (left, right) and from line to line (up, down), and say what the hover label says.
  function walk(place, event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const lines = place.data.map((line, number) => ({ line, number })).filter(({ line }) => line.visible === true && line.name !== "marks" && line.text);
    if (!lines.length) return;
    const [row, dot] = (place.dataset.at ?? "0,-1").split(",").map(Number);
    const nextRow = (row + step[0] + lines.length) % lines.length;
    const { line, number } = lines[nextRow];
    const nextDot = Math.min(Math.max(dot + step[1], 0), line.x.length - 1);
    place.dataset.at = `${nextRow},${nextDot}`;
    Plotly.Fx.hover(place, [{ curveNumber: number, pointNumber: nextDot }]);
    document.getElementById("spoken").textContent = `${line.name}: ${(line.hovertext ?? line.text)[nextDot]}`;
  }

  // -- tables -----------------------------------------------------------------------------------------------------

  const ownerOf = (text) => models.filter((name) => text === name || text.startsWith(`${name} `) || text.startsWith(`${name},`))
    .sort((a, b) => b.length - a.length)[0];

  function filterRows() {
    const query = state.query.toLowerCase();
    for (const table of all("table")) {
      for (const row of table.tBodies[0]?.rows ?? []) {
        const owner = ownerOf(row.cells[0].textContent.trim());
        const wanted = (!owner || state.models.has(owner)) && (!query || row.textContent.toLowerCase().includes(query));
        row.hidden = !wanted;
      }
    }
  }

  const bare = (cell) => (cell.firstChild?.nodeType === Node.TEXT_NODE ? cell.firstChild.textContent : cell.querySelector("bdi, code, a")?.textContent ?? cell.textContent).trim();
  const units = { B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40, ns: 1e-9, "µs": 1e-6, ms: 1e-3, s: 1 };

  function sortValue(text) {
    const found = /^([−-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?:\s*(\S+))?/i.exec(text);
    return found ? Number(found[1].replaceAll(",", "").replace("−", "-")) * (units[found[2]] ?? 1) : NaN;
  }

  function sortBy(table, column, header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    const rows = [...table.tBodies[0].rows];
    const keyed = rows.map((row) => ({ row, text: bare(row.cells[column] ?? row.cells[0]), value: sortValue(bare(row.cells[column] ?? row.cells[0])) }));
    const missing = (one) => Number.isNaN(one.value);
    const numbers = keyed.some((one) => !missing(one));
    keyed.sort((a, b) => {
      if (numbers && missing(a) !== missing(b)) return missing(a) ? 1 : -1; // a gap is last whatever the direction
      const order = numbers && !missing(a) ? a.value - b.value : a.text.localeCompare(b.text);
      return down ? -order : order;
    });
    table.tBodies[0].append(...keyed.map((one) => one.row));
    all("th[aria-sort]", table).forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
  }

  function sortable(table) {
    const headers = all("thead th", table);
    if (table.tBodies[0].rows.length < 2) return;
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sortBy(table, column, header));
      header.append(button);
    });
  }

  // -- exports ----------------------------------------------------------------------------------------------------

  function rowsOf(table) {
    const read = (cell) => [bare(cell), cell.querySelector("small")?.textContent.trim()].filter(Boolean).join(" ");
    const head = all("thead th", table).map((th) => th.textContent.trim());
    const body = all("tbody tr", table).filter((row) => !row.hidden).map((row) => [...row.cells].map(read));
    return [head, ...body];
  }

  const formula = (text) => (/^\s*[=+@-]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text);
  const latexSigns = { "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "−": "$-$" };
  const latex = (text) => text.replace(/[\\{}$&#%_^~−]/g, (sign) => latexSigns[sign]);
  const markdown = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replace(/([\\`*_[\]|])/g, "\\$1");
  const writers = {
    CSV: (rows) => rows.map((row) => row.map((text) => `"${formula(text).replaceAll('"', '""')}"`).join(",")).join("\n"),
    Markdown: ([head, ...body]) => [head, head.map(() => "---"), ...body].map((row, i) => `| ${row.map((t) => (i === 1 ? t : markdown(t))).join(" | ")} |`).join("\n"),
    LaTeX: ([head, ...body]) => {
      const line = (row) => `${row.map(latex).join(" & ")} \\\\`;
      return [`\\begin{tabular}{l${"r".repeat(head.length - 1)}}`, "\\toprule", line(head), "\\midrule", ...body.map(line), "\\bottomrule", "\\end{tabular}"].join("\n");
    },
    JSON: ([head, ...body]) => JSON.stringify(body.map((row) => Object.fromEntries(head.map((name, i) => [name, row[i] ?? null]))), null, 1),
  };

  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page from disk may have no clipboard
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }

  function button(text, action) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.addEventListener("click", () => action(made));
    return made;
  }

  function tableTools(table) {
    const tools = document.createElement("p");
    tools.className = "tools";
    tools.append("copy as ", ...Object.entries(writers).map(([name, write]) => button(name, (self) => copy(write(rowsOf(table)), self))));
    table.closest(".scroll").after(tools);
  }

  function figureTools(place) {
    const id = place.dataset.figure;
    const picture = place.parentElement.querySelector(".static svg");
    const tools = document.createElement("p");
    tools.className = "tools";
    const svg = () => new XMLSerializer().serializeToString(picture).replace(/var\(--(?:ink|grid), (#\w+)\)/g, "$1");
    const png = async () => {
      const address = await Plotly.toImage(place, { format: "png", width: 1200, height: 700, scale: 2 });
      save(`${id}.png`, await bytesOf(address));
    };
    tools.append("save as ", button("SVG", () => save(`${id}.svg`, new Blob([svg()], { type: "image/svg+xml" }))));
    if (figures[id]) tools.append(button("PNG", png));
    const table = place.parentElement.querySelector("table");
    tools.append(button("CSV", () => save(`${id}.csv`, new Blob([writers.CSV(rowsOf(table))], { type: "text/csv" }))));
    place.after(tools);
  }

  function bytesOf(address) {
    const text = atob(address.slice(address.indexOf(",") + 1));
    return new Blob([Uint8Array.from(text, (char) => char.charCodeAt(0))], { type: "image/png" });
  }

  // -- every point ------------------------------------------------------------------------------------------------

  function pointTable() {
    const { columns, words, rows } = data("point-data");
    const table = document.getElementById("points");
    if (!table) return;
    const cellColumn = columns.indexOf("cell");
    for (const row of rows) {
      const line = table.tBodies[0].insertRow();
      row.forEach((value, column) => {
        const text = typeof value === "string" ? value : value === null ? "" : words[value];
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        if (column === cellColumn && text) {
          const link = document.createElement("a");
          link.href = `#cell-${text}`;
          link.textContent = text.slice(0, 8);
          cell.append(link);
        } else cell.textContent = text;
        line.append(cell);
      });
    }
    const chooser = document.getElementById("point-columns");
    columns.forEach((name, column) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => all("tr", table).forEach((row) => { if (row.cells[column]) row.cells[column].hidden = !box.checked; }));
      label.append(box, ` ${name}`);
      if (column) chooser.append(label);
    });
  }

  // -- showing the state ------------------------------------------------------------------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const places = all(".live").filter((place) => place.dataset.figure in figures);
  let drawn = "";

  function show() {
    if (state.theme) root.dataset.theme = state.theme;
    else delete root.dataset.theme;
    all("#model-chips button").forEach((chip) => chip.setAttribute("aria-pressed", String(state.models.has(chip.dataset.model))));
    document.getElementById("x-scale").setAttribute("aria-pressed", String(state.x === "linear"));
    document.getElementById("theme").value = state.theme;
    const search = document.getElementById("query");
    if (search.value !== state.query) search.value = state.query;
    filterRows();
    all("li.target").forEach((item) => item.classList.remove("target"));
    if (state.cell) {
      const item = all(".cells li").find((li) => li.id.startsWith(`cell-${state.cell}`));
      item?.classList.add("target");
    }
    const now = [[...state.models].join(), state.x, state.theme, dark.matches].join("|");
    if (now !== drawn) places.forEach(draw);
    drawn = now;
  }

  function goToCell() {
    document.querySelector("li.target")?.scrollIntoView({ block: "center" });
  }

  document.getElementById("toolbar").hidden = false;
  all("#model-chips button").forEach((chip) => chip.addEventListener("click", () => toggle(chip.dataset.model)));
  document.getElementById("x-scale").addEventListener("click", () => change({ x: state.x ? "" : "linear" }));
  document.getElementById("theme").addEventListener("change", (event) => change({ theme: event.target.value }));
  document.getElementById("query").addEventListener("input", (event) => change({ query: event.target.value }));
  document.getElementById("reset").addEventListener("click", () => change({ models: new Set(models), x: "", query: "", cell: "" }));
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#cell-"]');
    if (!link) return;
    event.preventDefault();
    change({ cell: link.getAttribute("href").slice(6) });
    goToCell();
  });
  window.addEventListener("hashchange", () => { readAddress(); show(); });
  window.addEventListener("beforeprint", () => all("details:not([open])").forEach((d) => { d.dataset.closed = "1"; d.open = true; }));
  window.addEventListener("afterprint", () => all("details[data-closed]").forEach((d) => { delete d.dataset.closed; d.open = false; }));
  dark.addEventListener("change", show);

  pointTable();
  all("table").forEach(sortable);
  all(".scroll > table").forEach(tableTools);
  all(".live").forEach(figureTools);
  all(".command").forEach((code) => code.after(button("copy", (self) => copy(code.textContent, self))));
  readAddress();
  show();
  goToCell();
})();

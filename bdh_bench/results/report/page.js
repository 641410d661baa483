// Draws the figures that the page carries as data. The static pictures stay where drawing fails and on paper.
"use strict";
(() => {
  if (typeof Plotly === "undefined") return;
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const paper = style.getPropertyValue("--raised").trim();
    return { ink, grid, paper };
  }

  function dressed(layout) {
    const { ink, grid, paper } = colours();
    const narrow = window.innerWidth < 600;
    const axis = (own) => ({ ...own, gridcolor: grid, linecolor: ink, tickcolor: ink });
    return {
      ...layout,
      font: { ...layout.font, color: ink, size: narrow ? 11 : layout.font.size },
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
      hoverlabel: { bgcolor: paper, bordercolor: ink, font: { color: ink } },
    };
  }

  function traces(data) {
    const { ink } = colours();
    return data.map((trace) =>
      trace.name === "marks" && !trace.line
        ? { ...trace, textfont: { color: ink, size: 11 }, marker: { ...trace.marker, color: ink, line: { width: 2, color: ink } } }
        : trace);
  }

  const settings = { responsive: true, displaylogo: false, displayModeBar: false };

  async function draw(place) {
    const figure = figures[place.dataset.figure];
    const picture = place.parentElement.querySelector(".static");
    place.hidden = false;
    try {
      await Plotly.react(place, traces(figure.data), dressed(figure.layout), settings);
      picture.hidden = true;
    } catch (error) {
      place.hidden = true;
      picture.hidden = false;
      console.warn("figure stays static:", place.dataset.figure, error);
    }
  }

  const places = [...document.querySelectorAll(".live")];
  const all = () => places.forEach(draw);
  all();
  dark.addEventListener("change", all);
})();

"use strict";
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Text and lines take the page's own colours, so that every plot reads on light and on dark.
  const themed = (layout) => {
    const page = getComputedStyle(document.documentElement);
    const colour = (name) => page.getPropertyValue(name).trim();
    const axis = (old) => ({...old, gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line")});
    return {
      ...layout,
      font: {family: "system-ui, sans-serif", size: 12, color: colour("--text")},
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
      hoverlabel: {...layout.hoverlabel, bgcolor: colour("--back"), bordercolor: colour("--line"), font: {color: colour("--text")}},
    };
  };

  const unpack = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const settings = {responsive: true, displayModeBar: false, scrollZoom: false};
  const draw = async (figure) => {
    await Plotly.newPlot(figure.id, figure.data, themed(figure.layout), settings);
    document.getElementById(figure.id).dataset.drawn = Math.round(performance.now());
  };

  await unpack();
  for (const figure of figures) {
    await draw(figure);
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.body.dataset.ready = "true";
  dark.addEventListener("change", () => figures.forEach((figure) => Plotly.react(figure.id, figure.data, themed(figure.layout), settings)));
})();

/* Draws the charts of the page, and draws them anew when a step is chosen, the colours change or the page is resized.
   Everything that comes from the run goes through textContent or a chart's rows: never through markup. */
(() => {
  "use strict";
  const run = JSON.parse(document.getElementById("run").textContent);
  const root = document.documentElement;
  const drawn = new Map(); // host -> {chart, view, width}

  const wide = () => window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wide().matches);
  const palette = () => (dark() ? run.palettes.dark : run.palettes.light);

  function config() {
    const p = palette();
    const axis = {
      labelColor: p["@muted"], titleColor: p["@text"], gridColor: p["@grid"], domainColor: p["@grid"],
      tickColor: p["@grid"], labelFontSize: 11, titleFontSize: 12, titleFontWeight: 500, titlePadding: 8,
    };
    return {
      background: "transparent", font: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
      view: { stroke: null }, axis, axisY: { minExtent: 38 },
      legend: { labelColor: p["@text"], titleColor: p["@muted"], labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 },
      header: { labelColor: p["@text"], labelFontSize: 12, labelFontWeight: 600, labelAnchor: "start", labelLimit: 420 },
      text: { color: p["@text"] }, title: { color: p["@text"], fontSize: 12, fontWeight: 600 },
    };
  }

  function fill(node, tokens) {
    if (Array.isArray(node)) return node.map((item) => fill(item, tokens));
    if (node && typeof node === "object") {
      const out = {};
      for (const [key, value] of Object.entries(node)) {
        const filled = fill(value, tokens);
        if (filled !== undefined) out[key] = filled;
      }
      return out;
    }
    return typeof node === "string" && node.startsWith("@") ? tokens[node] : node;
  }

  function sizes(host, columns) {
    const room = Math.max(260, host.clientWidth);
    const across = room < 620 ? 1 : columns || 2;
    return {
      "@width": room - 72, "@columns": across, "@cell": Math.floor(room / across) - 78,
      "@square": Math.min(380, room - 190),
    };
  }

  async function draw(host, chart) {
    const tokens = { ...palette(), ...sizes(host, chart.columns), ...chart.tokens };
    const spec = fill(chart.spec, tokens);
    spec.datasets = chart.datasets;
    const before = drawn.get(host);
    const result = await vegaEmbed(host, spec, {
      ast: true, actions: false, renderer: "svg", config: config(),
      tooltip: { theme: dark() ? "dark" : "light" }, loader: { load: () => Promise.reject(new Error("no network")) },
    });
    if (before) before.view.finalize();
    drawn.set(host, { chart, view: result.view, width: host.clientWidth });
    if (chart.onStep) {
      result.view.addEventListener("click", (event, item) => {
        let row = item && item.datum;
        if (row && row.datum) row = row.datum;
        if (row && row.row === "estimate") chart.onStep(row.step);
      });
    }
    host.dataset.drawn = String(Number(host.dataset.drawn || 0) + 1);
    return result.view;
  }

  const redraw = () => Promise.all([...drawn].map(([host, { chart }]) => draw(host, chart)));

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function limitsOf(values) {
    let low = Infinity, high = -Infinity;
    // one by one: a call takes no more than some ten thousand arguments, and a firing may have more draws
    for (const value of values) {
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return [0, 1];
    const margin = 0.08 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  }

  // ------------------------------------------------------------------------------------------------ a step to choose
  function picker(part, firings, show) {
    const range = part.querySelector("input[type=range]");
    const output = part.querySelector("output");
    let place = firings.length - 1;
    const go = (to) => {
      place = Math.max(0, Math.min(firings.length - 1, to));
      range.value = String(place);
      output.textContent = firings[place].label;
      range.setAttribute("aria-valuetext", firings[place].label);
      return show(firings[place]);
    };
    range.min = "0";
    range.max = String(firings.length - 1);
    range.disabled = firings.length < 2;
    range.addEventListener("input", () => go(Number(range.value)));
    part.querySelector(".back").addEventListener("click", () => go(place - 1));
    part.querySelector(".forth").addEventListener("click", () => go(place + 1));
    return {
      go, last: () => go(firings.length - 1), again: () => go(place),
      nearest(step) {
        const gaps = firings.map((firing) => Math.abs(firing.step - step));
        return go(gaps.indexOf(Math.min(...gaps)));
      },
      replace(others) {
        const step = firings[place].step;
        firings = others;
        range.max = String(firings.length - 1);
        range.disabled = firings.length < 2;
        return this.nearest(step);
      },
    };
  }

  // ---------------------------------------------------------------------------------------------------------- chains
  let chainsPicker = null;
  function chains() {
    const part = document.getElementById("chains");
    if (!part || !run.chains.length) return null;
    const host = part.querySelector(".chart"), verdict = part.querySelector(".verdict");
    const which = part.querySelector("select.monitor"), form = part.querySelector("select.form");
    const show = (firing) => {
      verdict.textContent = firing.words;
      verdict.classList.toggle("bad", !firing.valid);
      const running = form.value === "running";
      const rows = [];
      const seen = firing.band.flatMap((band) => [band.low, band.high]);
      // a chain that was left out has been anywhere on its way: the others could not be told apart beside it
      const kept = firing.out.length < firing.draws.length;
      firing.draws.forEach((values, chain) => {
        const counts = !kept || !firing.out.includes(chain);
        let sum = 0, count = 0;
        values.forEach((llc, place) => {
          rows.push({ chain, draw: place * firing.every, llc });
          if (llc === null) return;
          sum += llc;
          count += 1;
          // the running mean of the first draws is noise: it must not set the scale
          if (!counts) return;
          if (!running) seen.push(llc);
          else if (place >= values.length / 10) seen.push(sum / count);
        });
      });
      return draw(host, {
        spec: running ? run.specs.running : run.specs.draws,
        datasets: { rows, band: firing.band }, tokens: { "@limits": limitsOf(seen) },
      });
    };
    chainsPicker = picker(part, run.chains[0].firings, show);
    if (which) which.addEventListener("change", () => chainsPicker.replace(run.chains[Number(which.value)].firings));
    form.addEventListener("change", () => chainsPicker.again());
    return chainsPicker.last();
  }

  // ------------------------------------------------------------------------------------------------------- influence
  function sampleCard(suspect, place) {
    const card = element("div", "sample");
    const shown = run.samples[suspect.index];
    if (shown && shown.image) {
      const image = element("img");
      image.src = shown.image;
      image.alt = `sample ${suspect.index}`;
      card.append(image);
    } else if (shown && shown.text) {
      card.append(element("p", "", shown.text));
    }
    const group = suspect.group ? ` “${suspect.group}”` : "";
    card.append(element("b", "", `${place}. #${suspect.index}${group}`));
    card.append(element("span", "", `mean loss ${suspect.mean}`));
    card.append(element("span", "", `loss ${suspect.plain}, rank ${suspect.rank}`));
    return card;
  }

  async function influence() {
    const part = document.getElementById("influence");
    if (!part || !run.influence.length) return;
    const gallery = part.querySelector(".gallery");
    const groups = part.querySelector(".chart.groups"), samples = part.querySelector(".chart.samples");
    const verdict = part.querySelector(".verdict");
    const show = async (firing) => {
      verdict.textContent = firing.words;
      verdict.classList.toggle("bad", !firing.valid);
      gallery.replaceChildren(...firing.suspects.map((suspect, k) => sampleCard(suspect, k + 1)));
      gallery.classList.toggle("text", firing.suspects.some((s) => run.samples[s.index] && run.samples[s.index].text && !run.samples[s.index].image));
      if (groups && firing.groups.length) {
        const most = Math.max(...firing.groups.map((row) => Math.abs(row.value))) || 1;
        await draw(groups, {
          spec: run.specs.groups, datasets: { rows: firing.groups },
          tokens: {
            "@limits": [-most, -most / 2.5, 0, most / 2.5, most], "@unit": firing.unit,
            "@angle": firing.groups.every((row) => row.train.length <= 3) ? 0 : -45,
          },
        });
      }
      if (samples && firing.samples) {
        const known = run.known[firing.samples.known];
        const rows = firing.samples.plain.map((plain, k) => ({
          plain, mean: firing.samples.mean[k], suspect: firing.samples.suspects.includes(k),
          words: `Sample ${known.index[k]}${known.group ? ` “${known.group[k]}”` : ""}: loss ${plain}, mean loss over the posterior ${firing.samples.mean[k]}, self-influence ${firing.samples.own[k]}`,
        })).filter((row) => row.plain !== null && row.mean !== null);
        rows.sort((a, b) => Number(a.suspect) - Number(b.suspect));
        await draw(samples, { spec: firing.samples.log ? run.specs.samplesLog : run.specs.samples, datasets: { rows } });
      }
    };
    await picker(part, run.influence, show).last();
  }

  // ------------------------------------------------------------------------------------------------------- the whole
  async function all() {
    const still = [...document.querySelectorAll(".chart[data-chart]")];
    for (const host of still) {
      const chart = run.charts[host.dataset.chart];
      if (host.dataset.chart === "curve") chart.onStep = (step) => chainsPicker && chainsPicker.nearest(step);
      await draw(host, chart);
      if (host.dataset.chart === "curve") {
        root.dataset.first = String(Math.round(performance.now()));
        await chains();
      }
    }
    await influence();
    root.dataset.ready = String(Math.round(performance.now()));
  }

  function contents() {
    const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.getAttribute("href").slice(1), a]));
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.classList.remove("here");
        links.get(entry.target.id)?.classList.add("here");
      }
    }, { rootMargin: "-10% 0px -75% 0px" });
    document.querySelectorAll("main section[id]").forEach((section) => watch.observe(section));
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    redraw();
  });
  wide().addEventListener("change", redraw);
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const [host, { chart, width }] of drawn) if (Math.abs(host.clientWidth - width) > 8) draw(host, chart);
    }, 150);
  });
  contents();
  all();
})();

(() => {
  const form = document.getElementById("trial-filter");
  const points = [...document.querySelectorAll(".point")];
  const choose = (point) => {
    for (const each of points) each.classList.toggle("on", each.dataset.trial === point.dataset.trial);
    form.elements.chosen.value = point.querySelector("title").textContent;
  };
  for (const point of points) {
    for (const event of ["pointerenter", "focus", "click"]) point.addEventListener(event, () => choose(point));
  }
  form.addEventListener("input", () => {
    const methods = new Set([...form.querySelectorAll("[name=method]:checked")].map((box) => box.value));
    for (const point of points) {
      const shown = methods.has(point.dataset.method) && (!form.elements.front.checked || point.classList.contains("front"));
      point.classList.toggle("off", !shown);
    }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
})();

// What is wrong with the page for those who use it otherwise; an empty list if nothing.
() => {
  const found = [];
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push(`two are #${id}`);
  for (const each of document.querySelectorAll("input, textarea, select")) {
    if (!each.labels.length) found.push(`#${each.id} has no label`);
  }
  for (const each of document.querySelectorAll("[aria-labelledby], [aria-describedby], [for]")) {
    for (const name of ["aria-labelledby", "aria-describedby", "for"]) {
      for (const id of (each.getAttribute(name) ?? "").split(" ").filter(Boolean)) {
        if (!document.getElementById(id)) found.push(`${name} names #${id}, which is not there`);
      }
    }
  }
  for (const each of document.querySelectorAll("button, [role=img], [role=progressbar]")) {
    if (!each.textContent.trim() && !each.ariaLabel) found.push(`${each.outerHTML} has no name`);
  }
  const headings = [...document.querySelectorAll("h1, h2, h3")].map((each) => Number(each.tagName[1]));
  headings.forEach((level, i) => {
    if (i && level > headings[i - 1] + 1) found.push(`heading ${i} skips a level`);
  });

  // Contrast of text with its ground, by WCAG's formula.
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  let texts = 0;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.disabled || !element.checkVisibility()) continue;
    texts += 1;
    const [a, b] = [rgba(getComputedStyle(element).color), ground(element)].map(luminance).sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`${element.textContent.slice(0, 20)}: contrast ${contrast.toFixed(1)}`);
  }
  if (texts < 60) found.push(`only ${texts} texts were looked at`);
  return found;
}

// WCAG's contrast of every visible text against what it stands on, the page's luminance, and how far it is wider than its window.
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    const [R, G, B] = [r, g, b].map(c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    return a ? 0.2126 * R + 0.7152 * G + 0.0722 * B : null;
  };
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const found = luminance(getComputedStyle(at).backgroundColor);
      if (found !== null) return found;
    }
    return 1;
  };
  const contrasts = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(one => one.nodeType === 3 && one.data.trim()) || node.matches("input, textarea");
    if (!own || !node.checkVisibility() || node.matches("script, style")) continue;
    const colors = [getComputedStyle(node).color];
    if (node.placeholder) colors.push(getComputedStyle(node, "::placeholder").color);
    for (const color of colors) {
      const [dark, light] = [luminance(color), behind(node)].sort((a, b) => a - b);
      contrasts[`${node.tagName}.${node.id || node.className}: ${color}`] = (light + 0.05) / (dark + 0.05);
    }
  }
  return {contrasts, paper: behind(document.body), overhang: document.documentElement.scrollWidth - innerWidth};
}

// Pictures of the page, for docs/images and for whoever changes its looks.

export const SHOTS = [
  { name: "light", scheme: "light", width: 1180, height: 800 },
  { name: "dark", scheme: "dark", width: 1180, height: 800, panel: true },
  { name: "narrow", scheme: "light", width: 390, height: 780, scale: 2 },
];
const QUESTIONS = ["Descrivi in tre frasi un mattino d’inverno in un paese di montagna.", "Anna ha 17 mele e ne regala 5. Quante gliene restano?"];

// One short conversation in every form; returns the files' paths.
export async function shoot(browser, url, out) {
  const files = [];
  for (const shot of SHOTS) {
    const context = await browser.createBrowserContext(), page = await context.newPage();
    await page.setViewport({ width: shot.width, height: shot.height, deviceScaleFactor: shot.scale ?? 1 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: shot.scheme }, { name: "prefers-reduced-motion", value: "reduce" }]);
    await page.evaluateOnNewDocument(() => Object.defineProperty(navigator, "language", { get: () => "it-IT" }));
    await page.goto(url);
    await page.screenshot({ path: `${out}/${shot.name}-blank.png` });
    if (shot.panel) await page.click("#tune");
    for (const question of QUESTIONS) {
      await page.type("#input", question);
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelector("#send").textContent === "Invia" && document.querySelector(".again"), { timeout: 60000 });
    }
    const path = `${out}/${shot.name}.png`;
    await page.screenshot({ path });
    files.push(path);
    await context.close();
  }
  return files;
}

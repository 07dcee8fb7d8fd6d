
// Three repairs of OHIF 3.10.0-beta.5.
window.config.extensions.push({
  id: 'ofl-sam2.repairs',
  onModeEnter: ({ commandsManager, servicesManager }) => {
    showImagesNotSegmentations(servicesManager.services.hangingProtocolService);
    storeOnTheServerOfTheStudies(commandsManager);
    sayWhyItFailed(servicesManager.services.uiNotificationService);
  },
});

// The three views of the MONAI Label mode show the first series that is a volume, which a SEG with a low number also is.
function showImagesNotSegmentations(hangingProtocolService) {
  const { seriesMatchingRules } = hangingProtocolService.getProtocolById('mpr').displaySetSelectors.activeDisplaySet;
  if (seriesMatchingRules.some(rule => rule.attribute === 'Modality')) return;
  seriesMatchingRules.push({ attribute: 'Modality', constraint: { doesNotEqual: { value: 'SEG' } }, required: true });
}

// Two commands are called storeSegmentation: CORNERSTONE's, which the menu means and which picks the server, and
// SEGMENTATION's, which stores on the server it is given. The later one wins, and "Export DICOM SEG" ends in an error.
// A third one, later still, sends each call to the right one.
function storeOnTheServerOfTheStudies(commandsManager) {
  const context = 'OFL_SAM2';
  if (!commandsManager.getContext('SEGMENTATION') || commandsManager.getContext(context)) return;
  commandsManager.createContext(context);
  commandsManager.registerCommand(context, 'storeSegmentation', {
    commandFn: options =>
      commandsManager.runCommand('storeSegmentation', options, options.dataSource ? 'SEGMENTATION' : 'CORNERSTONE'),
  });
}

// The MONAI Label panel says "Failed to Run Segmentation" and no more. The server's sentence is shown beside it.
function sayWhyItFailed(notifications) {
  const send = XMLHttpRequest.prototype.send;
  if (send.saysWhy) return;
  XMLHttpRequest.prototype.send = function (...body) {
    this.addEventListener('load', () => {
      if (this.status < 400 || !new URL(this.responseURL).pathname.startsWith('/infer/')) return;
      const answer = this.responseType === 'arraybuffer' ? new TextDecoder().decode(this.response) : this.responseText;
      const message = JSON.parse(answer).detail;
      notifications.show({ title: 'OFL-SAM2', message, type: 'error', duration: 10000 });
    });
    return send.apply(this, body);
  };
  XMLHttpRequest.prototype.send.saysWhy = true;
}

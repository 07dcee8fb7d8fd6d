
// Two repairs of OHIF 3.10.0-beta.5.
window.config.extensions.push({
  id: 'ofl-sam2.repairs',
  onModeEnter: ({ commandsManager, servicesManager }) => {
    showImagesNotSegmentations(servicesManager.services.hangingProtocolService);
    storeOnTheServerOfTheStudies(commandsManager);
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
